// A hash of sampled values: tells a packed convolution weight that its sources were written to
// behind autograd's version counter (through .data).
#include <cstring>

#include "../ops.h"
#include "host.h"

namespace fusedres {
namespace {

constexpr int64_t kWholeBytes = 16384;  // a tensor up to this size is hashed whole
constexpr int64_t kSamples = 64;        // words taken of a larger one: a cache miss each

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;  // 2^64 over the golden ratio (Knuth 6.4)
  return hash ^ (hash >> 32);
}

uint64_t word_at(const char* p, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, p, static_cast<size_t>(std::min<int64_t>(bytes, 8)));
  return word;
}

uint64_t add_tensor(uint64_t hash, const Tensor& t) {
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t step = bytes <= kWholeBytes ? 8 : bytes / kSamples / 8 * 8;
  hash = mix(hash, static_cast<uint64_t>(bytes));
  for (int64_t i = 0; i < bytes; i += step) hash = mix(hash, word_at(data + i, bytes - i));
  return hash;
}

}  // namespace

// Computes: a hash of up to 16 KiB of each dense tensor, of 64 words of a larger one
// Reads:    at most 64 cache lines of the weight, the [C] parameters whole
// Writes:   nothing
// Traffic:  about 4 KiB + 16*C bytes, a few microseconds
// Split:    one thread
int64_t fingerprint(Tensor weight, OptTensor bias, OptTensor bn_weight, OptTensor bn_bias,
                    Tensor mean, Tensor var) {
  uint64_t hash = add_tensor(add_tensor(add_tensor(0, weight), mean), var);
  for (const OptTensor* t : {&bias, &bn_weight, &bn_bias}) {
    hash = t->has_value() ? add_tensor(hash, **t) : mix(hash, 0);
  }
  return static_cast<int64_t>(hash);
}

}  // namespace fusedres
