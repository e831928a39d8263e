// The passes of stream_apply.cuh, compiled once for all ops.
#include "stream_apply.cuh"

namespace fusedres {
namespace cuda {

FUSEDRES_INSTANCES(template, forward_apply, StreamParams);
FUSEDRES_INSTANCES(template, backward_apply, StreamParams);

}  // namespace cuda
}  // namespace fusedres
