#include "client/prefix_check.h"

#include <cstdint>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/page_names.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

template <typename... Parts>
absl::Status Wrong(const Parts&... parts) {
  return absl::DataLossError(absl::StrCat(parts...));
}

absl::Status CheckSkip(const v1::KvManifest& manifest, const KvExpectation& expected) {
  const int64_t skip = manifest.skip_tokens();
  if (skip >= manifest.num_tokens()) {
    return Wrong("manifest: skip_tokens=", skip,
                 " leaves none of num_tokens=", manifest.num_tokens());
  }
  if (skip == expected.skip_tokens) return absl::OkStatus();
  const std::string names = PageNames(manifest, expected.token_ids);
  const int64_t held =
      CountHeldPages(names, expected.held_pages) * manifest.layout().block_tokens();
  if (skip > expected.skip_tokens && skip <= held) return absl::OkStatus();
  return Wrong("manifest: skip_tokens=", skip, ", the request skips ", expected.skip_tokens,
               ", and pages are held up to token ", held);
}

absl::Status CheckCacheRoot(const v1::KvManifest& manifest, const KvExpectation& expected) {
  if (!manifest.has_cache_root()) return absl::OkStatus();
  const v1::CacheRoot& root = manifest.cache_root();
  if (expected.prefix_reuse == v1::PREFIX_REUSE_NONE) {
    return Wrong("manifest: cache_root, but the request wants no cached prefix");
  }
  if (!expected.cache_salt.empty() && root.salt() != expected.cache_salt) {
    return Wrong("manifest: cache_root has another salt than the request");
  }
  const bool dense = expected.dense || expected.prefix_reuse == v1::PREFIX_REUSE_DENSE;
  if (dense && root.has_attention()) {
    return Wrong("manifest: cache_root has sparse attention, the request asked for dense pages");
  }
  return absl::OkStatus();
}

v1::AttentionProvenance::Algorithm CachedAlgorithm(const v1::KvManifest& manifest) {
  if (manifest.cached_tokens() == 0) return v1::AttentionProvenance::ALGORITHM_UNSPECIFIED;
  return manifest.cache_root().has_attention() ? v1::AttentionProvenance::ALGORITHM_PROXY_ATTN
                                               : v1::AttentionProvenance::ALGORITHM_DENSE;
}

absl::Status CheckPageHashes(const v1::KvManifest& manifest, const KvExpectation& expected) {
  const std::string& hashes = manifest.page_hashes();
  const size_t pages = manifest.num_tokens() / manifest.layout().block_tokens();
  if (hashes.size() % kPageNameBytes != 0 || hashes.size() / kPageNameBytes > pages ||
      (!manifest.has_cache_root() && !hashes.empty())) {
    return Wrong("completed: page_hashes has ", hashes.size(), " bytes for ", pages, " pages");
  }
  if (expected.token_ids.empty() || hashes.empty()) return absl::OkStatus();
  if (absl::StartsWith(PageNames(manifest, expected.token_ids), hashes)) return absl::OkStatus();
  return Wrong("completed: page_hashes are not the names of the prompt's pages");
}

}  // namespace

absl::Status CheckPrefix(const v1::KvManifest& manifest, const KvExpectation& expected) {
  HEADSTART_RETURN_IF_ERROR(CheckCacheRoot(manifest, expected));
  return CheckSkip(manifest, expected);
}

absl::Status CheckCachedPrefix(const v1::KvManifest& manifest, const KvExpectation& expected) {
  const uint32_t cached = manifest.cached_tokens();
  if (cached >= manifest.num_tokens() || (cached > 0 && !manifest.has_cache_root())) {
    return Wrong("completed: cached_tokens=", cached, " of num_tokens=", manifest.num_tokens(),
                 manifest.has_cache_root() ? "" : " without cache_root");
  }
  if (manifest.cached_algorithm() != CachedAlgorithm(manifest)) {
    return Wrong("completed: cached_algorithm=", manifest.cached_algorithm(), ", expected ",
                 CachedAlgorithm(manifest));
  }
  return CheckPageHashes(manifest, expected);
}

}  // namespace headstart
