// Tensor maps: what the driver would refuse is refused here, and a copy is made by the map alone.
// Boxes beyond the tensor are zeros; PTX ISA, "Tiled mode", "Im2col mode", "Swizzling modes".
#include <algorithm>
#include <cstring>

#include "../include/cuda.h"
#include "../include/sim/hopper.h"
#include "state.h"

namespace sim {
namespace {

constexpr int kElement = 2;  // bytes: maps are of 16-bit values
constexpr int kSwizzled = 128;

// What both encodings demand (cuTensorMapEncodeTiled, cuTensorMapEncodeIm2col).
bool is_valid(const CUtensorMap& m, CUtensorMapDataType type, uint64_t inner_bytes) {
  if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {
    return false;
  }
  if (m.rank < 1 || m.rank > 5 || reinterpret_cast<uintptr_t>(m.data) % 16 != 0) return false;
  for (int i = 0; i < m.rank; ++i) {
    if (m.sizes[i] == 0 || m.sizes[i] > uint64_t{1} << 32) return false;
    if (i > 0 && (m.strides[i] % 16 != 0 || m.strides[i] >= uint64_t{1} << 40)) return false;
    if (i > 0 && (m.steps[i] < 1 || m.steps[i] > 8)) return false;
  }
  const bool swizzles = m.swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  return inner_bytes % 16 == 0 && (!swizzles || inner_bytes <= kSwizzled);
}

CUtensorMap map_of(cuuint32_t rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                   const cuuint32_t* steps, CUtensorMapSwizzle swizzle) {
  CUtensorMap m{};
  m.encoded = true;
  m.rank = static_cast<int>(rank);
  m.data = static_cast<const char*>(data);
  m.swizzle = swizzle;
  for (int i = 0; i < std::min(m.rank, 5); ++i) {
    m.sizes[i] = sizes[i];
    m.strides[i] = i == 0 ? kElement : strides[i - 1];
    m.steps[i] = static_cast<int>(steps[i]);
  }
  return m;
}

struct Box {
  char* bytes;  // the next row
  int row_bytes;
};

// Channels from c of the pixel at `pixel`; null: zeros.
void add_row(const CUtensorMap& m, Box* box, const char* pixel, int64_t c) {
  std::memset(box->bytes, 0, static_cast<size_t>(box->row_bytes));
  const int64_t size = static_cast<int64_t>(m.sizes[0]);
  const int64_t first = std::max<int64_t>(c, 0);
  const int64_t end = std::min<int64_t>(c + box->row_bytes / kElement, size);
  if (pixel != nullptr && first < end) {
    Seen reading;
    std::memcpy(box->bytes + (first - c) * kElement, pixel + first * kElement,
                static_cast<size_t>((end - first) * kElement));
  }
  box->bytes += box->row_bytes;
}

// Where the coordinates, the outer ones, are in memory; null beyond the tensor.
const char* place_of(const CUtensorMap& m, const int64_t* at) {
  const char* place = m.data;
  for (int i = 1; i < m.rank; ++i) {
    if (at[i] < 0 || at[i] >= static_cast<int64_t>(m.sizes[i])) return nullptr;
    place += at[i] * static_cast<int64_t>(m.strides[i]);
  }
  return place;
}

void fill_tiled(const CUtensorMap& m, const int64_t (&first)[5], Box box) {
  int64_t rows = 1;
  for (int i = 1; i < m.rank; ++i) rows *= m.box[i];
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at[5];
    int64_t rest = row;
    for (int i = 1; i < m.rank; ++i) {
      at[i] = first[i] + rest % m.box[i];
      rest /= m.box[i];
    }
    add_row(m, &box, place_of(m, at), first[0]);
  }
}

// Pixels from `first` on through the bounding box, W fastest; the offsets shift what is read.
void fill_im2col(const CUtensorMap& m, const int64_t (&first)[5], const int (&offsets)[3],
                 Box box) {
  const int spatial = m.rank - 2;
  int64_t at[5];
  std::copy(first, first + 5, at);
  for (int pixel = 0; pixel < m.pixels; ++pixel) {
    int64_t shifted[5];
    std::copy(at, at + 5, shifted);
    for (int i = 0; i < spatial; ++i) shifted[1 + i] += offsets[i];
    add_row(m, &box, place_of(m, shifted), first[0]);
    int i = 0;
    for (; i < spatial; ++i) {
      at[1 + i] += m.steps[1 + i];
      if (at[1 + i] < static_cast<int64_t>(m.sizes[1 + i]) + m.upper[i]) break;
      at[1 + i] = m.lower[i];
    }
    if (i == spatial) ++at[m.rank - 1];
  }
}

// The box as it lies in memory, to shared memory as the map swizzles it.
void write_box(const CUtensorMap& m, const std::vector<char>& box, char* to, uint64_t address) {
  std::vector<char> laid(box.size());
  for (size_t i = 0; i < box.size(); i += 16) {
    const uint64_t plain = address + i;
    const uint64_t chunk = m.swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? plain >> 7 & 7 : 0;
    std::memcpy(&laid[(plain ^ chunk << 4) - address], &box[i], 16);
  }
  Seen writing;
  std::memcpy(to, laid.data(), laid.size());
}

void copy_box(void* shared, const CUtensorMap* map, std::initializer_list<int> at,
              std::initializer_list<int> offsets, uint64_t* barrier, const char* name) {
  Unseen quiet;
  const bool im2col = offsets.size() > 0;
  if (!map->encoded || map->im2col != im2col || map->rank != static_cast<int>(at.size())) {
    fail(std::string(name) + ": the tensor map is not of this kind and rank");
  }
  const uint64_t address = shared_address(shared);
  if (address % (map->swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 1024 : 128) != 0) {
    fail(std::string(name) + ": wanted an address that is a multiple of the swizzle's 1024 bytes");
  }
  int64_t first[5] = {};
  int by[3] = {};
  std::copy(at.begin(), at.end(), first);
  std::copy(offsets.begin(), offsets.end(), by);
  if (std::any_of(by, by + 3, [](int offset) { return offset < 0 || offset > 255; })) {
    fail(std::string(name) + ": wanted offsets from 0 to 255");
  }
  const int row = (im2col ? map->channels : map->box[0]) * kElement;
  int64_t rows = im2col ? map->pixels : 1;
  for (int i = 1; i < map->rank && !im2col; ++i) rows *= map->box[i];
  const size_t bytes = static_cast<size_t>(rows * row);
  start_copy(static_cast<char*>(shared), bytes, barrier, [=, map = *map] {
    std::vector<char> box(bytes);
    if (im2col) {
      fill_im2col(map, first, by, {box.data(), row});
    } else {
      fill_tiled(map, first, {box.data(), row});
    }
    write_box(map, box, static_cast<char*>(shared), address);
  });
}

}  // namespace

void tensor_copy(void* shared, const CUtensorMap* map, std::initializer_list<int> at,
                 uint64_t* barrier) {
  copy_box(shared, map, at, {}, barrier, "tensor_copy");
}

void tensor_copy_im2col(void* shared, const CUtensorMap* map, std::initializer_list<int> at,
                        std::initializer_list<int> offsets, uint64_t* barrier) {
  copy_box(shared, map, at, offsets, barrier, "tensor_copy_im2col");
}

}  // namespace sim

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  CUtensorMap m = sim::map_of(rank, data, sizes, strides, steps, swizzle);
  if (!sim::is_valid(m, type, uint64_t{box[0]} * sim::kElement)) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < m.rank; ++i) {
    // boxes in steps are not modelled
    if (box[i] < 1 || box[i] > 256 || m.steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    m.box[i] = static_cast<int>(box[i]);
  }
  *map = m;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                 const int* lower, const int* upper, cuuint32_t channels,
                                 cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave,
                                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  CUtensorMap m = sim::map_of(rank, data, sizes, strides, steps, swizzle);
  if (rank < 3 || channels < 1 || channels > 256 || pixels < 1 || pixels > 1024 ||
      !sim::is_valid(m, type, uint64_t{channels} * sim::kElement)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int limit = rank == 3 ? 32768 : rank == 4 ? 128 : 16;
  for (int i = 0; i < m.rank - 2; ++i) {
    if (lower[i] < -limit || lower[i] >= limit || upper[i] < -limit || upper[i] >= limit ||
        static_cast<int64_t>(m.sizes[1 + i]) + upper[i] <= lower[i]) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    m.lower[i] = lower[i];
    m.upper[i] = upper[i];
  }
  m.im2col = true;
  m.channels = static_cast<int>(channels);
  m.pixels = static_cast<int>(pixels);
  *map = m;
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool tiled = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  const bool im2col = std::strcmp(symbol, "cuTensorMapEncodeIm2col") == 0;
  *function = tiled    ? reinterpret_cast<void*>(cuTensorMapEncodeTiled)
              : im2col ? reinterpret_cast<void*>(cuTensorMapEncodeIm2col)
                       : nullptr;
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
