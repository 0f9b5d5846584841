// Causal GQA attention on the CPU, dense or over the blocks of a selection.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/op_args.h"

namespace headstart {

// Keeps its working memory between calls; used by one thread at a time.
//
// Every output row is computed by one thread in an order that depends on its position and its kept
// blocks alone: the result does not depend on the number of threads, and a selection of all blocks
// gives the bits of dense attention.
class CpuAttention {
 public:
  CpuAttention(const simd::AttentionKernels& kernels, int32_t num_threads)
      : kernels_(kernels), num_threads_(num_threads) {}

  // `selection` is null for dense attention. RESOURCE_EXHAUSTED when working memory is short: that
  // of one layer's K and V, and a tile per thread.
  absl::Status Run(const SequenceAttention& args, const BlockSelection* selection);

  // Working memory once sequences of `num_tokens` tokens have run.
  int64_t PlanScratchBytes(const HeadShape& shape, int64_t num_tokens) const;

 private:
  // Query rows [row, row + num_rows) of a head, all in one block, which see num_blocks key blocks:
  // the first ones, or with a selection the best ones of the row's causal_blocks.
  struct Tile {
    int32_t head;
    int64_t row;
    int64_t num_rows;
    int64_t num_blocks;
    int64_t causal_blocks;
  };

  // Sizes of packed_, of one thread's part of tile_scratch_, and of partials_.
  int64_t PackedBytes(const HeadShape& shape, int64_t num_tokens) const;
  int64_t TileScratchBytes(const HeadShape& shape, int64_t num_tokens) const;
  static int64_t PartialsBytes(const HeadShape& shape, int64_t num_rows, int64_t num_tokens);

  absl::Status RunTiles(const SequenceAttention& args, const BlockSelection* selection);
  absl::Status RunRows(const SequenceAttention& args);
  void ListTiles(const SequenceAttention& args, const BlockSelection* selection);
  void PackPages(const SequenceAttention& args, char* packed) const;
  void RunTile(const SequenceAttention& args, const BlockSelection* selection, const Tile& tile,
               const char* packed, char* scratch) const;

  const simd::AttentionKernels& kernels_;
  const int32_t num_threads_;
  std::vector<Tile> tiles_;
  Scratch packed_;
  Scratch tile_scratch_;
  Scratch partials_;
};

}  // namespace headstart
