// Parts of the KV of a prompt, and the chunks that it is cut into.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/attention_params.h"

namespace headstart {

// Tokens of a prompt; those of whole pages but for its ends.
struct TokenRange {
  int64_t begin = 0;
  int64_t count = 0;

  int64_t end() const { return begin + count; }
  int64_t first_page() const { return begin / kBlockTokens; }
  int64_t num_pages() const { return NumBlocks(end()) - first_page(); }
};

// What every page of a model's KV looks like, and how many go into a chunk.
struct KvGeometry {
  int32_t num_layers = 0;
  HeadShape heads;
  DType dtype = DType::kBF16;
  int64_t chunk_pages = 1;  // most pages of a chunk

  // The same KV as it is shipped in another type.
  KvGeometry As(DType shipped) const {
    KvGeometry out = *this;
    out.dtype = shipped;
    return out;
  }
  // K and V of one token in one layer, without scales.
  int64_t token_bytes() const {
    return 2 * int64_t{heads.num_kv_heads} * heads.head_dim * DTypeBytes(dtype);
  }
  // In front of a page; 0 of types that need none.
  int64_t scale_bytes() const { return dtype == DType::kF8E4M3 ? Fp8ScaleBytes(heads) : 0; }
  int64_t page_bytes() const { return scale_bytes() + token_bytes() * kBlockTokens; }
  int64_t chunk_bytes() const { return page_bytes() * chunk_pages; }
  // On the wire: of so many heads of the tokens, in one layer.
  int64_t wire_bytes(const TokenRange& tokens, int32_t head_count) const {
    return (tokens.count * token_bytes() + tokens.num_pages() * scale_bytes()) /
           heads.num_kv_heads * head_count;
  }
};

// Pages of a chunk: as many as make 1 MiB, which is what gRPC moves best, and at least one.
int64_t ChunkPages(int64_t page_bytes);

// Layers, KV heads and every stripe_count-th chunk of these layers, from stripe_index on, in the
// order in which they become ready. Nothing is left open: no count is zero.
struct KvPart {
  int32_t layer_begin = 0;
  int32_t layer_count = 0;
  int32_t head_begin = 0;
  int32_t head_count = 0;
  int32_t stripe_index = 0;
  int32_t stripe_count = 1;

  bool HasLayer(int32_t layer) const {
    return layer >= layer_begin && layer < layer_begin + layer_count;
  }
  bool operator==(const KvPart&) const = default;
};

KvPart WholeKv(const KvGeometry& geometry);

// INVALID_ARGUMENT, the field's name first in the message: empty, or not inside the model.
absl::Status CheckPart(const KvPart& part, const KvGeometry& geometry);

// INVALID_ARGUMENT names a layer and a head that no reader gets whole, or what is wrong with one:
// not inside the model, or the same part as another.
absl::Status CheckCoverage(absl::Span<const KvPart> readers, const KvGeometry& geometry);

// How tokens [first_position, first_position + num_tokens), a multiple of kBlockTokens on, are cut
// into the chunks of a layer, without those below skip_tokens. Depends on nothing else, so chunks
// can be counted.
std::vector<TokenRange> CutIntoChunks(int64_t first_position, int64_t num_tokens,
                                      int64_t skip_tokens, int64_t chunk_pages);

}  // namespace headstart
