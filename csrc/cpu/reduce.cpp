// Plans of the streaming kernels and the merge of their partial sums. Tiles and the order in which
// they are merged depend on shapes only: results do not change with the number of threads.
#include <numeric>

#include "host.h"

namespace fusedres {
namespace {

constexpr int64_t kLanes = 16;             // of every instruction set, see simd.h
constexpr int64_t kPackedColumns = 512;    // enough work a row, and accumulators that stay in L1
constexpr int64_t kApplyElements = 32768;  // a tile of an elementwise pass
constexpr int64_t kMergeColumns = 64;

Plan groups_of(const View& v, bool per_image) {
  Plan plan{};
  plan.groups = v.planar ? v.n * v.c : per_image ? v.n : 1;
  plan.rows = v.planar || per_image ? v.hw : v.n * v.hw;
  plan.cols = v.planar ? 1 : v.c;
  plan.col_blocks = 1;
  return plan;
}

// Moments of each group's columns, from those of its tiles.
Pair merge_tiles(const Plan& plan, const Pair& tiles) {
  const int64_t last = plan.rows - (plan.tiles - 1) * plan.tile_rows;
  return merge_moments(tiles, plan.groups, plan.tiles, plan.cols, plan.tile_rows, last);
}

Pair zeros(const View& v, bool per_image) {
  const size_t size = static_cast<size_t>(per_image ? v.n * v.c : v.c);
  return {std::vector<double>(size), std::vector<double>(size)};
}

// Rows to pack so that a packed row fills whole vectors and amortises the row loop.
int64_t rows_to_pack(const Plan& plan, bool planar, bool with_mask) {
  if (plan.cols == 0) return 1;
  if (planar) return plan.rows < 1024 ? kLanes : 4 * kLanes;
  // a mask row ends at a byte: rows whose bits do not fill bytes cannot be packed
  if (with_mask && plan.cols % 8 != 0) return 1;
  int64_t unit = kLanes / std::gcd(plan.cols, kLanes);
  if (unit * plan.cols > kMaxColumns) unit = 1;
  int64_t pack = unit * std::max<int64_t>(1, kPackedColumns / (unit * plan.cols));
  while (pack > unit && pack > plan.rows / 8) pack -= unit;
  return pack * plan.cols <= kMaxColumns ? pack : 1;
}

}  // namespace

Plan reduce_plan(const View& v, bool per_image, bool with_mask) {
  Plan plan = groups_of(v, per_image);
  plan.pack = rows_to_pack(plan, v.planar, with_mask);
  plan.col_block = plan.cols;
  if (plan.pack == 1 && plan.cols > kPackedColumns) {
    plan.col_blocks = (plan.cols + kPackedColumns - 1) / kPackedColumns;
    const int64_t even = (plan.cols + plan.col_blocks - 1) / plan.col_blocks;
    plan.col_block = (even + kLanes - 1) / kLanes * kLanes;
    plan.col_blocks = (plan.cols + plan.col_block - 1) / plan.col_block;
  }
  plan.tile_rows = kChain * plan.pack;
  plan.tiles = std::max<int64_t>(1, (plan.rows + plan.tile_rows - 1) / plan.tile_rows);
  return plan;
}

Plan apply_plan(const View& v, bool per_image, bool with_mask) {
  Plan plan = groups_of(v, per_image);
  plan.pack = rows_to_pack(plan, v.planar, with_mask);
  plan.col_block = plan.cols;
  const int64_t packed = plan.pack * plan.cols;
  plan.tile_rows = std::max<int64_t>(1, kApplyElements / std::max<int64_t>(1, packed)) * plan.pack;
  plan.tiles = std::max<int64_t>(1, (plan.rows + plan.tile_rows - 1) / plan.tile_rows);
  return plan;
}

StreamParams stream_params(const View& v, const Plan& plan, bool per_image) {
  StreamParams p{};
  p.plan = plan;
  p.center_groups = v.planar ? v.c : 1;
  p.coef_groups = per_image ? (v.planar ? v.n * v.c : v.n) : p.center_groups;
  return p;
}

void set_mask(const View& v, const uint8_t* in, uint8_t* out, StreamParams* p) {
  p->mask_in = in;
  p->mask_out = out;
  if (v.planar) {
    p->mask_row_bytes = p->plan.pack / 8;
    p->mask_group_bytes = v.mask_row_bytes();
  } else {
    p->mask_row_bytes = p->plan.pack > 1 ? p->plan.pack * v.c / 8 : v.mask_row_bytes();
    p->mask_group_bytes = p->plan.rows * v.mask_row_bytes();
  }
}

void launch(StreamFn fn, const StreamParams& p) {
  if (p.plan.groups * p.plan.rows * p.plan.cols == 0) return;
  const int64_t rows = std::min(p.plan.tile_rows, p.plan.rows);
  parallel_items(p.plan.items(), rows * p.plan.col_block,
                 [&](int64_t begin, int64_t end) { fn(p, begin, end); });
}

Pair merge_moments(const Pair& tiles, int64_t groups, int64_t n_tiles, int64_t cols,
                   int64_t tile_count, int64_t last_count) {
  const size_t size = static_cast<size_t>(groups * cols);
  Pair out{std::vector<double>(size), std::vector<double>(size)};
  const double total = static_cast<double>(tile_count * (n_tiles - 1) + last_count);
  const int64_t blocks = (cols + kMergeColumns - 1) / kMergeColumns;
  const bool variance = !tiles.second.empty();
  parallel_items(groups * blocks, n_tiles * kMergeColumns * 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c0 = item % blocks * kMergeColumns;
      const int64_t width = std::min(kMergeColumns, cols - c0);
      const int64_t from = item / blocks * n_tiles * cols + c0;
      double* mean = out.first.data() + item / blocks * cols + c0;
      double* m2 = out.second.data() + item / blocks * cols + c0;
      for (int64_t t = 0; t < n_tiles; ++t) {
        const double weight =
            static_cast<double>(t + 1 < n_tiles ? tile_count : last_count) / total;
        const double* tile_mean = tiles.first.data() + from + t * cols;
        for (int64_t c = 0; c < width; ++c) mean[c] += weight * tile_mean[c];
      }
      for (int64_t t = 0; variance && t < n_tiles; ++t) {
        const double n = static_cast<double>(t + 1 < n_tiles ? tile_count : last_count);
        const double* tile_mean = tiles.first.data() + from + t * cols;
        const double* tile_m2 = tiles.second.data() + from + t * cols;
        for (int64_t c = 0; c < width; ++c) {
          const double off = tile_mean[c] - mean[c];
          m2[c] += tile_m2[c] + n * off * off;
        }
      }
    }
  });
  return out;
}

Pair merge_sums(const Pair& tiles, int64_t groups, int64_t n_tiles, int64_t cols) {
  const size_t size = static_cast<size_t>(groups * cols);
  Pair out{std::vector<double>(size), std::vector<double>(size)};
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t t = 0; t < n_tiles; ++t) {
      const double* first = tiles.first.data() + (g * n_tiles + t) * cols;
      const double* second = tiles.second.data() + (g * n_tiles + t) * cols;
      for (int64_t c = 0; c < cols; ++c) {
        out.first[static_cast<size_t>(g * cols + c)] += first[c];
        out.second[static_cast<size_t>(g * cols + c)] += second[c];
      }
    }
  }
  return out;
}

Pair moments(const View& v, const void* x, bool per_image, bool variance) {
  if (v.numel() == 0) return zeros(v, per_image);
  const Plan plan = reduce_plan(v, per_image, false);
  StreamParams p = stream_params(v, plan, per_image);
  const size_t size = static_cast<size_t>(plan.groups * plan.tiles * plan.cols);
  Pair tiles{std::vector<double>(size), std::vector<double>(variance ? size : 0)};
  p.x = x;
  p.partial1 = tiles.first.data();
  p.partial2 = tiles.second.data();
  launch(kernels().stats[v.dtype][variance], p);
  Pair merged = merge_tiles(plan, tiles);
  return v.planar && !per_image ? channel_moments(v, merged) : merged;
}

Pair apply_with_moments(const View& v, bool per_image, StreamFn apply, StreamParams p) {
  if (v.numel() == 0) return zeros(v, false);
  const Plan plan = reduce_plan(v, per_image, p.mask_out != nullptr);
  const size_t size = static_cast<size_t>(plan.groups * plan.tiles * plan.cols);
  Pair tiles{std::vector<double>(size), std::vector<double>(size)};
  p.plan = plan;
  set_mask(v, nullptr, p.mask_out, &p);
  StreamParams result = stream_params(v, plan, per_image);
  result.x = p.out;
  result.partial1 = tiles.first.data();
  result.partial2 = tiles.second.data();
  const StreamFn stats = kernels().stats[v.dtype][true];
  parallel_items(plan.items(), plan.tile_rows * plan.col_block, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      apply(p, item, item + 1);
      stats(result, item, item + 1);  // of a tile that the cache still holds
    }
  });
  const Pair merged = merge_tiles(plan, tiles);
  return v.planar || per_image ? channel_moments(v, merged) : merged;
}

Pair channel_moments(const View& v, const Pair& per_image) {
  return merge_moments(per_image, 1, v.n, v.c, v.hw, v.hw);
}

Pair gradient_sums(const View& v, bool per_image, UMode mode, StreamParams p,
                   std::vector<double>* residual_sums) {
  if (residual_sums != nullptr) *residual_sums = zeros(v, per_image).first;
  if (v.numel() == 0) return zeros(v, per_image);
  const Plan plan = reduce_plan(v, per_image, p.mask_in != nullptr);
  const size_t size = static_cast<size_t>(plan.groups * plan.tiles * plan.cols);
  Pair tiles{std::vector<double>(size), std::vector<double>(size)};
  p.plan = plan;
  set_mask(v, p.mask_in, nullptr, &p);
  p.partial1 = tiles.first.data();
  p.partial2 = tiles.second.data();
  Pair third{std::vector<double>(residual_sums != nullptr ? size : 0), {}};
  p.partial3 = residual_sums != nullptr ? third.first.data() : nullptr;
  launch(kernels().bwd_reduce[v.dtype][mode], p);
  const auto merged = [&](const Pair& of_tiles) {
    Pair sums = merge_sums(of_tiles, plan.groups, plan.tiles, plan.cols);
    return v.planar && !per_image ? merge_sums(sums, 1, v.n, v.c) : sums;
  };
  if (residual_sums != nullptr) {
    third.second = third.first;
    *residual_sums = merged(third).first;
  }
  return merged(tiles);
}

}  // namespace fusedres
