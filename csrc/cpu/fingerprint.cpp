// A hash of sampled values: tells a packed convolution weight that its sources were written to
// behind autograd's version counter (through .data).
#include <cstring>

#include "../ops.h"
#include "host.h"

namespace fusedres {
namespace {

constexpr int64_t kWholeBytes = 16384;  // a weight up to this size is hashed whole

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;  // 2^64 over the golden ratio (Knuth 6.4)
  return hash ^ (hash >> 32);
}

uint64_t word_at(const char* p, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, p, static_cast<size_t>(std::min<int64_t>(bytes, 8)));
  return word;
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

uint64_t add_whole(uint64_t hash, const Tensor& t) {
  const int64_t bytes = bytes_of(t);
  const char* data = static_cast<const char*>(t.const_data_ptr());
  hash = mix(hash, static_cast<uint64_t>(bytes));
  int64_t i = 0;
  uint64_t lanes[4] = {1, 2, 3, 4};  // four words at a time: each waits for the one before it
  for (; i + 32 <= bytes; i += 32) {
    for (int k = 0; k < 4; ++k) lanes[k] = mix(lanes[k], word_at(data + i + 8 * k, 8));
  }
  for (const uint64_t lane : lanes) hash = mix(hash, lane);
  for (; i < bytes; i += 8) hash = mix(hash, word_at(data + i, bytes - i));
  return hash;
}

// One element of every filter, of every input channel and of every tap: along the diagonal.
uint64_t add_weight(uint64_t hash, const Tensor& t, bool whole) {
  if (whole || bytes_of(t) <= kWholeBytes) return add_whole(hash, t);
  const int64_t element = static_cast<int64_t>(t.element_size());
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t filters = t.size(0), channels = t.size(1), rows = t.size(2), cols = t.size(3);
  const int64_t samples = std::max({filters, channels, rows * cols});
  hash = mix(hash, static_cast<uint64_t>(samples));
  const int64_t strides[4] = {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  int64_t filter = 0, channel = 0, row = 0, col = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t at =
        filter * strides[0] + channel * strides[1] + row * strides[2] + col * strides[3];
    hash = mix(hash, word_at(data + at * element, element));
    // Counted, not divided: with divisions between them few of the cache misses overlap.
    if (++filter == filters) filter = 0;
    if (++channel == channels) channel = 0;
    if (++col < cols) continue;
    col = 0;
    if (++row == rows) row = 0;
  }
  return hash;
}

}  // namespace

// Computes: a hash of one element of every filter, input channel and tap of the weight (of all
//           of it, if asked or up to 16 KiB), and of the [C] parameters
// Reads:    at most max(filters, input channels, taps) cache lines of the weight, or all of it
// Writes:   nothing
// Traffic:  64*max(O, I) + 16*C bytes, microseconds; whole: the weight's size
// Split:    one thread
int64_t fingerprint(Tensor weight, OptTensor bias, OptTensor bn_weight, OptTensor bn_bias,
                    Tensor mean, Tensor var, bool whole) {
  uint64_t hash = add_whole(add_whole(add_weight(0, weight, whole), mean), var);
  for (const OptTensor* t : {&bias, &bn_weight, &bn_bias}) {
    hash = t->has_value() ? add_whole(hash, **t) : mix(hash, 0);
  }
  return static_cast<int64_t>(hash);
}

}  // namespace fusedres
