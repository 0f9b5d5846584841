#include "engine/schedule/prefix_hits.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"

namespace headstart {
namespace {

int64_t WholePages(int64_t num_tokens) { return num_tokens / kBlockTokens * kBlockTokens; }

size_t PageOf(int64_t token) { return static_cast<size_t>(token / kBlockTokens); }

}  // namespace

int64_t NamedTokens(const PrefillRequest& request, int64_t piece_tokens) {
  const PrefixCaching& prefix = request.prefix;
  const int64_t num_tokens = request.num_tokens();
  if (!prefix.cache_root.has_value() || num_tokens == 0) return 0;
  if (!prefix.any_page) return (num_tokens - 1) / piece_tokens * piece_tokens;
  return WholePages(prefix.keeps_pages ? num_tokens : num_tokens - 1);
}

int64_t CountHeld(absl::Span<const PageHash> names, absl::string_view held) {
  absl::flat_hash_set<absl::string_view> set;
  for (; held.size() >= sizeof(PageHash); held.remove_prefix(sizeof(PageHash))) {
    set.insert(held.substr(0, sizeof(PageHash)));
  }
  int64_t count = 0;
  for (const PageHash& name : names) {
    if (!set.contains({reinterpret_cast<const char*>(name.bytes.data()), name.bytes.size()})) break;
    ++count;
  }
  return count;
}

int64_t PrefixHits::RunTokens(const PrefillRequest& request) const {
  return request.prefix.any_page ? kBlockTokens : piece_tokens_;
}

int64_t PrefixHits::Limit(const PrefillRequest& request) const {
  const auto named = static_cast<int64_t>(request.page_names.size()) * kBlockTokens;
  return std::min(named, WholePages(std::max<int64_t>(request.num_tokens() - 1, 0)));
}

int64_t PrefixHits::Count(const PrefillRequest& request, int64_t from) const {
  const int64_t run = RunTokens(request), limit = Limit(request);
  int64_t found = from;
  for (int64_t token = from; token + kBlockTokens <= limit; token += kBlockTokens) {
    if (!pool_.Has(request.page_names[PageOf(token)])) break;
    if ((token + kBlockTokens) % run == 0) found = token + kBlockTokens;
  }
  return found;
}

const PageHash* PrefixHits::NextName(const PrefillRequest& request, int64_t num_computed,
                                     int64_t ready) const {
  // Pages that are found under another attention's root stand for the start of a prompt only.
  const bool same_attention = request.prefix.keeps_pages;
  if (ready >= Limit(request) || (!same_attention && num_computed > 0)) return nullptr;
  return &request.page_names[PageOf(ready)];
}

void PrefixHits::Extend(ActiveRequest& request, bool begins) const {
  if (NextName(request.request, request.num_computed, request.ready) == nullptr) return;
  // Only pages of whole runs are touched: the others would seem to be in use.
  const int64_t end = Count(request.request, request.ready);
  for (int64_t token = request.ready; token < end; token += kBlockTokens) {
    CachedPage page = *pool_.Find(request.request.page_names[PageOf(token)]);
    if (begins) {
      request.pages.Append(std::move(page.page));
    } else {
      request.pages.Replace(static_cast<int64_t>(PageOf(token)), std::move(page.page));
    }
    request.state = std::move(page.state);
  }
  if (end == request.ready) return;
  request.result.cached_tokens += end - request.ready;
  request.ready = end;
  request.slot_is_stale = true;
}

absl::Span<const PageHash> PrefixHits::KeptNames(const PrefillRequest& request, int64_t begin,
                                                 int64_t end) const {
  const auto names = absl::MakeConstSpan(request.page_names);
  const size_t last = std::min(PageOf(end), names.size());
  if (!request.prefix.keeps_pages || PageOf(begin) >= last) return {};
  return names.subspan(PageOf(begin), last - PageOf(begin));
}

std::string PrefixHits::TrueNames(const ActiveRequest& request) const {
  // Behind pages of another attention's root none of its own is true.
  const size_t found = PageOf(request.result.cached_tokens);
  const std::vector<PageHash>& names = request.request.page_names;
  const size_t count = request.request.prefix.keeps_pages ? names.size() : found;
  std::string bytes;
  for (size_t i = 0; i < count; ++i) bytes.append(names[i].bytes.begin(), names[i].bytes.end());
  return bytes;
}

void PrefixHits::Publish(const ActiveRequest& request, int64_t begin, int64_t end,
                         const std::shared_ptr<const SlotState>& state) const {
  const absl::Span<const PageHash> names = KeptNames(request.request, begin, end);
  for (size_t i = 0; i < names.size(); ++i) {
    const int32_t page = request.pages.pages()[PageOf(begin) + i];
    pool_.Publish(page, names[i], i + 1 == names.size() ? state : nullptr);
  }
}

}  // namespace headstart
