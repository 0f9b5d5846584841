// Names of KV pages. See "Page hashes" in the proto file.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace headstart {

// Equal only where the tokens up to the page's end, the model and the way of computing are.
struct PageHash {
  std::array<uint8_t, 16> bytes{};

  bool operator==(const PageHash&) const = default;
  template <typename H>
  friend H AbslHashValue(H state, const PageHash& name) {
    return H::combine(std::move(state), name.bytes);
  }
};

// Names of the prompt's first `num_pages` pages, all of whose tokens lie in `token_ids`.
// `cache_root`: the serialised one of the manifest.
std::vector<PageHash> HashPages(absl::string_view model_hash, absl::string_view cache_root,
                                absl::Span<const int32_t> token_ids, int64_t num_pages);

}  // namespace headstart
