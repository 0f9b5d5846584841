#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/parallel.h"

namespace headstart {
namespace {

// Up to this many query rows within a block, a decode's, read the pages as they are: packing them
// would cost more.
constexpr int64_t kMaxDirectRows = 4;

// Rows that begin a block are the end of a prompt whose start was computed before: they must get
// the bits that they get with all others, in tiles.
bool ReadsPagesDirectly(const SequenceAttention& args) {
  return args.q.rows <= kMaxDirectRows && args.first_position % kBlockTokens != 0;
}

// With fewer query blocks and heads than this per thread, tiles are smaller than a block, so that
// the threads end together. The tile height changes no result: rows are computed in the same
// groups.
constexpr int64_t kManyTilesPerThread = 16;
constexpr int64_t kSmallTileRows = 32;

const char* PageOf(const SequenceAttention& args, int64_t block, int32_t kv_head, bool values) {
  const KvPages& kv = args.kv;
  const int64_t elements = args.page_table[block] * kv.page_elements() +
                           (values ? kv.plane_elements() : 0) +
                           int64_t{kv_head} * kBlockTokens * kv.shape.head_dim;
  return static_cast<const char*>(kv.pages) + elements * DTypeBytes(kv.dtype);
}

// Joins the partial results of one row and head, in order. partials: `num_splits` times head_dim +
// 2 values (see RowArgs), `stride` apart.
template <typename T>
void JoinPartials(const float* partials, int64_t stride, int64_t num_splits, int64_t head_dim,
                  T* out) {
  float greatest = partials[head_dim];
  for (int64_t s = 1; s < num_splits; ++s) {
    greatest = std::max(greatest, partials[s * stride + head_dim]);
  }
  float sum = 0;
  float acc[simd::kMaxHeadDim] = {};
  for (int64_t s = 0; s < num_splits; ++s) {
    const float* partial = partials + s * stride;
    const float factor = std::exp2(partial[head_dim] - greatest);
    sum += partial[head_dim + 1] * factor;
    for (int64_t i = 0; i < head_dim; ++i) acc[i] += partial[i] * factor;
  }
  for (int64_t i = 0; i < head_dim; ++i) out[i] = T(acc[i] / sum);
}

// A tile's list of kept blocks, at the start of its scratch.
int64_t BlockListBytes(int64_t num_blocks) {
  return RoundUp(num_blocks * int64_t{sizeof(int32_t)}, 64);
}

int64_t PartialSize(const HeadShape& shape) { return shape.head_dim + 2; }

int64_t NumSplits(int64_t num_tokens) {
  return (num_tokens + simd::kRowTokens - 1) / simd::kRowTokens;
}

}  // namespace

absl::Status CpuAttention::Run(const SequenceAttention& args, const BlockSelection* selection) {
  if (selection == nullptr && ReadsPagesDirectly(args)) return RunRows(args);
  return RunTiles(args, selection);
}

int64_t CpuAttention::PackedBytes(const HeadShape& shape, int64_t num_tokens) const {
  return 2 * NumBlocks(num_tokens) * shape.num_kv_heads *
         kernels_.packed_page_bytes(shape.head_dim);
}

int64_t CpuAttention::TileScratchBytes(const HeadShape& shape, int64_t num_tokens) const {
  return BlockListBytes(NumBlocks(num_tokens)) +
         RoundUp(kernels_.tile_scratch_bytes(shape.head_dim), 64);
}

int64_t CpuAttention::PartialsBytes(const HeadShape& shape, int64_t num_rows, int64_t num_tokens) {
  return num_rows * shape.num_heads * NumSplits(num_tokens) * PartialSize(shape) *
         int64_t{sizeof(float)};
}

int64_t CpuAttention::PlanScratchBytes(const HeadShape& shape, int64_t num_tokens) const {
  return PackedBytes(shape, num_tokens) + num_threads_ * TileScratchBytes(shape, num_tokens) +
         PartialsBytes(shape, kMaxDirectRows, num_tokens);
}

void CpuAttention::ListTiles(const SequenceAttention& args, const BlockSelection* selection) {
  const int32_t num_heads = args.kv.shape.num_heads;
  const bool few = NumBlocks(args.q.rows) * num_heads < kManyTilesPerThread * num_threads_;
  const int64_t tile_rows = few ? kSmallTileRows : kBlockTokens;
  tiles_.clear();
  for (int64_t block_row = 0; block_row < args.q.rows; block_row += kBlockTokens) {
    const int64_t block_end = std::min(block_row + kBlockTokens, args.q.rows);
    const int64_t causal = NumBlocks(args.first_position + block_end);
    for (int32_t head = 0; head < num_heads; ++head) {
      const int64_t kept = selection == nullptr ? causal : selection->Count(head, causal - 1);
      for (int64_t row = block_row; row < block_end; row += tile_rows) {
        const int64_t num_rows = std::min(tile_rows, block_end - row);
        const int64_t seen = NumBlocks(args.first_position + row + num_rows);
        tiles_.push_back({head, row, num_rows, std::min(kept, seen), causal});
      }
    }
  }
  // Longest first, so that the threads end together.
  std::stable_sort(tiles_.begin(), tiles_.end(),
                   [](const Tile& a, const Tile& b) { return a.num_blocks > b.num_blocks; });
}

void CpuAttention::PackPages(const SequenceAttention& args, char* packed) const {
  const HeadShape& shape = args.kv.shape;
  const int64_t num_tokens = args.num_tokens();
  const int64_t num_blocks = NumBlocks(num_tokens);
  const int64_t page_bytes = kernels_.packed_page_bytes(shape.head_dim);
  ParallelFor(num_threads_, shape.num_kv_heads * num_blocks, [&](int64_t i, int32_t) {
    const auto kv_head = static_cast<int32_t>(i / num_blocks);
    const int64_t block = i % num_blocks;
    const int64_t tokens = std::min(kBlockTokens, num_tokens - block * kBlockTokens);
    char* k = packed + i * 2 * page_bytes;
    kernels_.pack_k(PageOf(args, block, kv_head, false), tokens, shape.head_dim, k);
    kernels_.pack_v(PageOf(args, block, kv_head, true), tokens, shape.head_dim, k + page_bytes);
  });
}

void CpuAttention::RunTile(const SequenceAttention& args, const BlockSelection* selection,
                           const Tile& tile, const char* packed, char* scratch) const {
  const HeadShape& shape = args.kv.shape;
  const int64_t page_bytes = kernels_.packed_page_bytes(shape.head_dim);
  const int64_t pages = NumBlocks(args.num_tokens());
  const int64_t first_col = int64_t{tile.head} * shape.head_dim;

  simd::TileArgs t;
  t.q = args.q.Rows(tile.row, tile.num_rows).Cols(first_col, shape.head_dim).data;
  t.q_stride = args.q.row_stride;
  t.num_rows = tile.num_rows;
  t.first_position = args.first_position + tile.row;
  t.head_dim = shape.head_dim;
  t.packed_k = packed + tile.head / shape.group_size() * pages * 2 * page_bytes;
  t.packed_v = t.packed_k + page_bytes;
  t.page_stride_bytes = 2 * page_bytes;
  t.num_blocks = tile.num_blocks;
  t.out = args.out.Rows(tile.row, tile.num_rows).Cols(first_col, shape.head_dim).data;
  t.out_stride = args.out.row_stride;

  auto* blocks = reinterpret_cast<int32_t*>(scratch);
  t.scratch = scratch + BlockListBytes(pages);
  if (selection != nullptr && tile.num_blocks < tile.causal_blocks) {
    const int32_t proxy = tile.head / (selection->num_heads / selection->num_proxies);
    const int32_t* ranking = selection->Ranking(proxy, tile.causal_blocks - 1);
    std::copy(ranking, ranking + tile.num_blocks, blocks);
    std::sort(blocks, blocks + tile.num_blocks);
    t.blocks = blocks;
  }
  kernels_.tile(t);
}

absl::Status CpuAttention::RunTiles(const SequenceAttention& args,
                                    const BlockSelection* selection) {
  const HeadShape& shape = args.kv.shape;
  const int64_t num_tokens = args.num_tokens();
  const int64_t scratch_bytes = TileScratchBytes(shape, num_tokens);
  HEADSTART_ASSIGN_OR_RETURN(char* const packed, packed_.Get(PackedBytes(shape, num_tokens)));
  HEADSTART_ASSIGN_OR_RETURN(char* const scratch, tile_scratch_.Get(num_threads_ * scratch_bytes));
  PackPages(args, packed);
  ListTiles(args, selection);
  ParallelFor(num_threads_, static_cast<int64_t>(tiles_.size()), [&](int64_t i, int32_t thread) {
    RunTile(args, selection, tiles_[i], packed, scratch + thread * scratch_bytes);
  });
  return absl::OkStatus();
}

absl::Status CpuAttention::RunRows(const SequenceAttention& args) {
  const HeadShape& shape = args.kv.shape;
  const int64_t tokens = args.num_tokens();
  const int64_t splits = NumSplits(tokens);
  const int64_t group = shape.group_size();
  const int64_t partial_size = PartialSize(shape);
  // [row][kv head][split][head of the group][partial_size]
  const int64_t row_size = shape.num_heads * splits * partial_size;
  HEADSTART_ASSIGN_OR_RETURN(char* const memory,
                             partials_.Get(PartialsBytes(shape, args.q.rows, tokens)));
  auto* partials = reinterpret_cast<float*>(memory);

  ParallelFor(num_threads_, args.q.rows * shape.num_kv_heads * splits, [&](int64_t i, int32_t) {
    const int64_t row = i / splits / shape.num_kv_heads;
    simd::RowArgs r;
    r.kv_head = static_cast<int32_t>(i / splits % shape.num_kv_heads);
    r.token_begin = i % splits * simd::kRowTokens;
    r.token_end = std::min(r.token_begin + simd::kRowTokens, args.first_position + row + 1);
    if (r.token_begin >= r.token_end) return;
    r.q = args.q.Rows(row, 1).Cols(r.kv_head * group * shape.head_dim, 0).data;
    r.group_size = group;
    r.head_dim = shape.head_dim;
    r.kv = &args.kv;
    r.page_table = args.page_table;
    r.partial = partials + i * group * partial_size;
    kernels_.row(r);
  });
  for (int64_t row = 0; row < args.q.rows; ++row) {
    for (int32_t head = 0; head < shape.num_heads; ++head) {
      const float* first =
          partials + row * row_size + (head / group * splits * group + head % group) * partial_size;
      const int64_t row_splits = NumSplits(args.first_position + row + 1);
      const Matrix out = args.out.Rows(row, 1).Cols(int64_t{head} * shape.head_dim, shape.head_dim);
      if (out.dtype == DType::kF32) {
        JoinPartials(first, group * partial_size, row_splits, shape.head_dim, out.Row<float>(0));
      } else {
        JoinPartials(first, group * partial_size, row_splits, shape.head_dim, out.Row<BFloat16>(0));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace headstart
