#include "engine/schedule/page_hash.h"

#include <openssl/sha.h>

#include <algorithm>
#include <bit>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/attention_params.h"
#include "kernels/base/check.h"

namespace headstart {
namespace {

static_assert(std::endian::native == std::endian::little, "ids are hashed as they lie in memory");

// The first bytes of the SHA-256.
PageHash Digest(const void* data, size_t size) {
  std::array<uint8_t, SHA256_DIGEST_LENGTH> digest;
  SHA256(static_cast<const unsigned char*>(data), size, digest.data());
  PageHash name;
  std::copy_n(digest.begin(), name.bytes.size(), name.bytes.begin());
  return name;
}

}  // namespace

std::vector<PageHash> HashPages(absl::string_view model_hash, absl::string_view cache_root,
                                absl::Span<const int32_t> token_ids, int64_t num_pages) {
  HEADSTART_CHECK(num_pages >= 0);
  HEADSTART_CHECK(num_pages * kBlockTokens <= static_cast<int64_t>(token_ids.size()));
  const absl::string_view end("\0", 1);
  const std::string root = absl::StrCat("headstart.v1.page", end, model_hash, end, cache_root);
  PageHash last = Digest(root.data(), root.size());
  std::vector<PageHash> names;
  names.reserve(static_cast<size_t>(num_pages));
  struct {
    PageHash before;
    std::array<int32_t, kBlockTokens> token_ids;
  } page;
  static_assert(sizeof(page) == sizeof(PageHash) + kBlockTokens * sizeof(int32_t));
  for (int64_t i = 0; i < num_pages; ++i) {
    page.before = last;
    std::copy_n(token_ids.begin() + i * kBlockTokens, kBlockTokens, page.token_ids.begin());
    last = Digest(&page, sizeof(page));
    names.push_back(last);
  }
  return names;
}

}  // namespace headstart
