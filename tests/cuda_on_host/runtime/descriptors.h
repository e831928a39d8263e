// What a wgmma's shared-memory operand is.
#pragma once

#include <cstdint>

namespace sim {

// A matrix descriptor, from its bits (PTX ISA, "Matrix Descriptor Format").
struct Operand {
  uint64_t start, stride;  // bytes
  int base, swizzle;
  explicit Operand(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base(static_cast<int>(bits >> 49 & 7)),
        swizzle(static_cast<int>(bits >> 62)) {}
  // 16 bytes, the half of a row's 16 values, with the swizzle of 128 bytes.
  uint64_t address(int row, int half) const {
    const uint64_t plain = start + row / 8 * stride + row % 8 * 128 + half * 16;
    return plain ^ (plain >> 7 & 7) << 4;
  }
};

}  // namespace sim
