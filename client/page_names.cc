#include "client/page_names.h"

#include <openssl/sha.h>

#include <bit>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace headstart {
namespace {

static_assert(std::endian::native == std::endian::little, "ids are hashed as they lie in memory");

std::string NameOf(absl::string_view bytes) {
  unsigned char hash[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), hash);
  return {reinterpret_cast<const char*>(hash), kPageNameBytes};
}

}  // namespace

std::string PageNames(const v1::KvManifest& manifest, absl::Span<const uint32_t> token_ids) {
  constexpr absl::string_view kZero("\0", 1);
  std::string last = NameOf(absl::StrCat("headstart.v1.page", kZero, manifest.model_hash(), kZero,
                                         manifest.cache_root().SerializeAsString()));
  const size_t page_tokens = manifest.layout().block_tokens();
  std::string names;
  for (; token_ids.size() >= page_tokens; token_ids.remove_prefix(page_tokens)) {
    const absl::string_view ids(reinterpret_cast<const char*>(token_ids.data()),
                                page_tokens * sizeof(uint32_t));
    last = NameOf(absl::StrCat(last, ids));
    names += last;
  }
  return names;
}

int64_t CountHeldPages(absl::string_view names, absl::string_view held) {
  absl::flat_hash_set<absl::string_view> set;
  for (; held.size() >= kPageNameBytes; held.remove_prefix(kPageNameBytes))
    set.insert(held.substr(0, kPageNameBytes));
  int64_t count = 0;
  for (; !names.empty(); names.remove_prefix(kPageNameBytes)) {
    if (!set.contains(names.substr(0, kPageNameBytes))) break;
    ++count;
  }
  return count;
}

}  // namespace headstart
