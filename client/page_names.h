// Names of KV pages, written from "Page hashes" in proto/headstart/v1/prefill.proto alone: what a
// server computes in code of its own is checked here. A decode node keeps them with its pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

inline constexpr size_t kPageNameBytes = 16;

// Names of the prompt's first pages, one behind the other, as many as have all their tokens in
// `token_ids`. By the manifest's model_hash, cache_root and block_tokens, which is at least 1.
std::string PageNames(const v1::KvManifest& manifest, absl::Span<const uint32_t> token_ids);

// How many of `names`, from the first one on, are among `held`, in any order.
int64_t CountHeldPages(absl::string_view names, absl::string_view held);

}  // namespace headstart
