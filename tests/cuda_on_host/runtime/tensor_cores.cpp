// mma.m16n8k16: the lanes' fragments are put together, multiplied, and handed out again. ldmatrix:
// their rows are.
#include <cstring>

#include "../include/cuda_bf16.h"
#include "../include/cuda_fp16.h"
#include "state.h"

namespace sim {
namespace {

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

float half_of(uint32_t word, int which, bool bfloat16) {
  const uint16_t bits = static_cast<uint16_t>(which == 0 ? word : word >> 16);
  return bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// PTX ISA 9.7.14.5.8: lane = 4 * group + t holds rows group and group + 8 of a, column group of b.
void multiply(const Fragments (&lanes)[32], bool bfloat16) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4;
    const int t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = group + 8 * (i / 2 % 2);
      a[row][t * 2 + i % 2 + 8 * (i / 4)] = half_of(lanes[lane].a[i / 2], i % 2, bfloat16);
    }
    for (int i = 0; i < 4; ++i) {
      b[t * 2 + i % 2 + 8 * (i / 2)][group] = half_of(lanes[lane].b[i / 2], i % 2, bfloat16);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2);
      const int column = lane % 4 * 2 + i % 2;
      float sum = lanes[lane].d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane].d[i] = sum;
    }
  }
}

}  // namespace

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  const Fragments mine{d, a, b};
  collect("mma", reinterpret_cast<uintptr_t>(&mine), [bfloat16](const uint64_t* values) {
    Fragments lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = *reinterpret_cast<const Fragments*>(values[i]);
    multiply(lanes, bfloat16);
  });
}

void load_matrices(uint32_t (&words)[4], const uint4& row) {
  struct Mine {
    uint32_t* words;
    uint32_t row[4];
  } const mine{words, {row.x, row.y, row.z, row.w}};
  collect("ldmatrix", reinterpret_cast<uintptr_t>(&mine), [](const uint64_t* values) {
    const auto lane = [values](int i) { return reinterpret_cast<const Mine*>(values[i]); };
    for (int i = 0; i < 32; ++i) {
      for (int m = 0; m < 4; ++m) lane(i)->words[m] = lane(8 * m + i / 4)->row[i % 4];
    }
  });
}

}  // namespace sim
