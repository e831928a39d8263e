// The passes of stream_reduce.cuh, compiled once for all ops.
#include "stream_reduce.cuh"

namespace fusedres {
namespace cuda {

FUSEDRES_INSTANCES(template, stream_stats, StreamParams);
FUSEDRES_INSTANCES(template, backward_reduce, StreamParams);

}  // namespace cuda
}  // namespace fusedres
