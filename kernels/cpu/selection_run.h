// The steps of one call of ProxyAttnSelector, over working memory that it brings.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention_params.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/op_args.h"

namespace headstart {

// Cuts an allocation into arrays, each on its own cache lines. Without memory it only adds up.
class MemoryCarver {
 public:
  explicit MemoryCarver(char* memory)
      : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {}
  template <typename T>
  T* Take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += RoundUp(count * int64_t{sizeof(T)}, 64);
    return part;
  }
  int64_t bytes() const { return static_cast<int64_t>(next_ - begin_); }

 private:
  uintptr_t begin_;
  uintptr_t next_;
};

// Sizes of one call. "Samples" are the tokens 0, stride, 2 stride, …
struct SelectionPiece {
  explicit SelectionPiece(const SequenceAttention& sequence)
      : args(sequence),
        options(*sequence.proxy_attn),
        shape(sequence.kv.shape),
        num_tokens(args.num_tokens()),
        num_blocks(NumBlocks(num_tokens)),
        first_row(args.first_position / kBlockTokens),
        key_groups(std::min(options.num_proxies, shape.num_kv_heads)),
        samples_per_block(kBlockTokens / options.stride),
        num_samples(RoundUp(num_tokens, options.stride) / options.stride),
        last_block_rows(num_tokens - (num_blocks - 1) * kBlockTokens),
        stats_stride(RoundUp(num_blocks, simd::kStatsAlign)) {}

  int64_t sample_pages() const { return NumBlocks(num_samples); }
  const char* Query(int64_t token, int64_t head) const {
    const int64_t row = token - args.first_position;
    const int64_t element = row * args.q.row_stride + head * shape.head_dim;
    return static_cast<const char*>(args.q.data) + element * DTypeBytes(args.q.dtype);
  }
  const char* Key(int64_t token, int64_t kv_head) const {
    const int64_t row = kv_head * kBlockTokens + token % kBlockTokens;
    const int64_t element =
        args.page_table[token / kBlockTokens] * args.kv.page_elements() + row * shape.head_dim;
    return static_cast<const char*>(args.kv.pages) + element * DTypeBytes(args.kv.dtype);
  }

  const SequenceAttention& args;
  const ProxyAttnOptions& options;
  const HeadShape& shape;
  int64_t num_tokens;
  int64_t num_blocks;
  int64_t first_row;
  int32_t key_groups;
  int64_t samples_per_block;
  int64_t num_samples;
  int64_t last_block_rows;
  int64_t stats_stride;
};

// Working memory of one thread.
struct SelectionThreadMemory {
  SelectionThreadMemory(const SelectionPiece& c, const simd::KernelTable& kernels,
                        MemoryCarver& memory)
      : rows(memory.Take<char>(kBlockTokens * c.shape.head_dim * DTypeBytes(c.args.q.dtype))),
        packed_page(memory.Take<char>(kernels.attention.packed_page_bytes(c.shape.head_dim))),
        packed_q(reinterpret_cast<float*>(memory.Take<char>(
            kernels.selection.packed_q_bytes(c.samples_per_block, c.shape.head_dim)))),
        max(memory.Take<float>(c.samples_per_block * c.stats_stride)),
        sum(memory.Take<float>(c.samples_per_block * c.stats_stride)),
        log_max(memory.Take<float>(c.stats_stride)),
        mass(memory.Take<float>(c.stats_stride)),
        sort_keys(memory.Take<uint64_t>(c.stats_stride)),
        order(memory.Take<int32_t>(c.stats_stride)) {}

  char* rows;         // pooled vectors of up to kBlockTokens samples
  char* packed_page;  // of keys
  float* packed_q;    // a query block's samples
  float* max;         // their stats, [samples_per_block][stats_stride]
  float* sum;
  float* log_max;  // of one row's blocks, as is all that follows
  float* mass;
  uint64_t* sort_keys;
  int32_t* order;
};

// What all threads share.
struct SelectionSharedMemory {
  SelectionSharedMemory(const SelectionPiece& c, const simd::KernelTable& kernels,
                        MemoryCarver& memory)
      : page_bytes(kernels.attention.packed_page_bytes(c.shape.head_dim)),
        query_floats(kernels.selection.packed_q_bytes(c.last_block_rows, c.shape.head_dim) / 4),
        sampled_keys(memory.Take<char>(c.key_groups * c.sample_pages() * page_bytes)),
        queries(memory.Take<float>(c.shape.num_heads * query_floats)),
        max(memory.Take<float>(c.shape.num_heads * c.last_block_rows * c.stats_stride)),
        sum(memory.Take<float>(c.shape.num_heads * c.last_block_rows * c.stats_stride)) {}

  int64_t page_bytes;
  int64_t query_floats;
  char* sampled_keys;  // packed pages of kBlockTokens samples, [key group][page]
  float* queries;      // the last query block, packed, [num_heads]
  float* max;          // its stats, [num_heads][last_block_rows][stats_stride]
  float* sum;
};

// The steps of one call. Every unit of parallel work writes its own results only, in an order that
// does not depend on the threads.
class SelectionRun {
 public:
  // memory: `bytes()` of an object made with null.
  SelectionRun(const SelectionPiece& piece, const simd::KernelTable& kernels, int32_t num_threads,
               char* memory)
      : c_(piece),
        kernels_(kernels),
        num_threads_(num_threads),
        carver_(memory),
        shared_(piece, kernels, carver_),
        threads_(carver_.Take<char>(num_threads * ThreadBytes())) {}
  int64_t bytes() const { return carver_.bytes(); }

  void PackSampledKeys() const;
  // Steps 1 and 3. Rows that are not `scored` have their blocks in forced order, then by index.
  void RankRows(bool scored, BlockSelection& selection) const;
  // Step 2 of the rules own and shared.
  void ScoreLastBlock() const;
  void SetBudgets(BlockSelection& selection) const;

 private:
  int64_t ThreadBytes() const {
    MemoryCarver carver(nullptr);
    SelectionThreadMemory(c_, kernels_, carver);
    return carver.bytes();
  }
  SelectionThreadMemory MemoryOf(int32_t thread) const {
    MemoryCarver carver(threads_ + thread * ThreadBytes());
    return SelectionThreadMemory(c_, kernels_, carver);
  }
  void PackSamplePage(int32_t group, int64_t page, const SelectionThreadMemory& memory) const;
  void ScoreRow(int32_t proxy, int64_t m, const SelectionThreadMemory& memory) const;
  void ScorePageForGroup(int32_t kv_head, int64_t page, const SelectionThreadMemory& memory) const;

  const SelectionPiece& c_;
  const simd::KernelTable& kernels_;
  const int32_t num_threads_;
  MemoryCarver carver_;
  SelectionSharedMemory shared_;
  char* threads_;
};

}  // namespace headstart
