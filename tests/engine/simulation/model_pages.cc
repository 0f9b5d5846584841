// Model: which pages the requests have, and what lies in them.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/engine/simulation/model.h"
#include "tests/engine/simulation/stamp.h"

namespace headstart::simulation {

int64_t Model::Findable(const RequestBook& request) const {
  const int64_t named = std::ssize(request.names) * kBlockTokens;
  return std::min(named, (request.num_tokens() - 1) / kBlockTokens * kBlockTokens);
}

int64_t Model::RunTokens(const RequestBook& request) const {
  return request.prefix.any_page ? kBlockTokens : options_.piece_tokens;
}

int64_t Model::CountFound(const RequestBook& request, int64_t from) const {
  int64_t there = from;
  while (there < Findable(request) && own_pages_.Has(request.names[there / kBlockTokens])) {
    there += kBlockTokens;
  }
  return std::max(from, there / RunTokens(request) * RunTokens(request));
}

void Model::TakeFound(RequestBook& request, bool begins) {
  // A start that another attention computed can't go on behind pages of its own.
  if (!request.prefix.keeps_pages && request.num_computed > 0) return;
  const int64_t found = CountFound(request, request.ready);
  for (int64_t token = request.ready; token < found; token += kBlockTokens) {
    const int64_t page = token / kBlockTokens;
    const int64_t before = own_pages_.free_pages();
    CachedPage cached = *own_pages_.Find(request.names[page]);
    seen_.shared_pages += own_pages_.free_pages() == before;
    seen_.late_pages += request.num_computed > 0;
    if (begins) {
      request.pages.Append(std::move(cached.page));
    } else {
      request.pages.Replace(page, std::move(cached.page));
    }
  }
  request.num_found += found - request.ready;
  if (found > request.ready) request.slot_is_stale = true;
  request.ready = found;
  if (!request.prefix.keeps_pages) DescribeContents(request);
}

bool Model::TakeDevice(RequestBook& request) {
  int64_t slots = options_.num_slots;
  for (const RequestBook* other : requests_) slots -= other->on_device();
  if (slots <= 0) return false;
  TakeFound(request, /*begins=*/true);
  auto missing = own_pages_.Take(NumBlocks(request.num_tokens()) - request.pages.size());
  if (!missing.ok()) {
    LeaveDevice(request);
    request.ready = 0;
    request.num_found = 0;
    return false;
  }
  for (const int32_t page : missing->pages()) names_[static_cast<size_t>(page)].reset();
  request.pages.Append(*std::move(missing));
  return true;
}

absl::Span<const PageHash> Model::KeptNames(const RequestBook& request, int64_t begin,
                                            int64_t end) const {
  const int64_t first = begin / kBlockTokens;
  const int64_t last = std::min(end / kBlockTokens, std::ssize(request.names));
  if (!request.prefix.keeps_pages || first >= last) return {};
  return absl::MakeConstSpan(request.names).subspan(first, last - first);
}

void Model::Publish(const RequestBook& request) {
  int64_t index = request.pass_begin / kBlockTokens;
  for (const PageHash& name : KeptNames(request, request.pass_begin, request.pass_end)) {
    const int32_t page = request.pages.pages()[static_cast<size_t>(index++)];
    if (!own_pages_.Has(name)) names_[static_cast<size_t>(page)] = name;
    own_pages_.Publish(page, name, nullptr);
  }
}

void Model::LeaveDevice(RequestBook& request) {
  request.slot = -1;
  request.pages = PageRefs();
}

void Model::CheckMayWrite(const RequestBook& request, int32_t page) {
  for (const RequestBook* other : requests_) {
    const std::vector<int32_t>& pages = other->pages.pages();
    if (other != &request && std::find(pages.begin(), pages.end(), page) != pages.end()) {
      Violate(Invariant::kShared,
              absl::StrCat(request.id, " writes page ", page, ", which ", other->id, " has too"));
    }
  }
  if (names_[static_cast<size_t>(page)].has_value()) {
    Violate(Invariant::kShared,
            absl::StrCat(request.id, " writes page ", page, ", which others can find"));
  }
}

void Model::DescribeContents(RequestBook& request) const {
  const PrefixCaching& prefix = request.prefix;
  request.root_content =
      prefix.cache_root.has_value() ? Mix(0, *prefix.cache_root) : Mix(request.key, 1);
  request.contents.clear();
  uint64_t content = request.root_content;
  const int64_t last = (request.num_tokens() - 1) / options_.piece_tokens * options_.piece_tokens;
  for (int64_t token = 0; token < request.num_tokens(); token += kBlockTokens) {
    const bool is_sparse = request.is_sparse && (prefix.keeps_pages || token >= request.num_found);
    const auto ids = absl::MakeConstSpan(request.token_ids).subspan(token, kBlockTokens);
    content = ContentBehind(content, ids, WayOf(is_sparse, token >= last, request.num_tokens()));
    request.contents.push_back(content);
  }
}

}  // namespace headstart::simulation
