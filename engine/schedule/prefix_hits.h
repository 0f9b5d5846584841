// How the start of a prompt is found in the page pool, and left there for others.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/schedule/active_request.h"
#include "engine/schedule/page_pool.h"

namespace headstart {

// Tokens from the first one on whose pages have a name: whole pages; of sparse prompts those of
// pieces before the last one, whose KV depends on where the prompt ends.
int64_t NamedTokens(const PrefillRequest& request, int64_t piece_tokens);

// Pages from the first one on that are named in `held`, 16 bytes for each name.
int64_t CountHeld(absl::Span<const PageHash> names, absl::string_view held);

class PrefixHits {
 public:
  // The pool outlives this.
  PrefixHits(PagePool* pool, int64_t piece_tokens) : pool_(*pool), piece_tokens_(piece_tokens) {}

  // Tokens whose KV the pool has, `from` (those before it are known) included; takes nothing.
  int64_t Count(const PrefillRequest& request, int64_t from) const;

  // Moves `ready` on over what the pool has, and takes these pages: behind the request's own as
  // long as it has no others (it begins), else in place of those.
  void Extend(ActiveRequest& request, bool begins) const;

  // The name under which the page behind `ready` may be found, when `num_computed` tokens were
  // computed; null: it will be computed.
  const PageHash* NextName(const PrefillRequest& request, int64_t num_computed,
                           int64_t ready) const;

  // Names of the whole pages of tokens [begin, end), as far as they are to be found by others.
  absl::Span<const PageHash> KeptNames(const PrefillRequest& request, int64_t begin,
                                       int64_t end) const;

  // Of all pages of a computed prompt whose name is true of them: 16 bytes each.
  std::string TrueNames(const ActiveRequest& request) const;

  // Makes these pages findable, that were just computed. `state`: behind the last one.
  void Publish(const ActiveRequest& request, int64_t begin, int64_t end,
               const std::shared_ptr<const SlotState>& state) const;

 private:
  // Pages are found in runs of that many tokens: sparse KV can be gone on with only behind a piece.
  int64_t RunTokens(const PrefillRequest& request) const;
  // The last token's page is always computed: its logits are wanted.
  int64_t Limit(const PrefillRequest& request) const;

  PagePool& pool_;
  const int64_t piece_tokens_;
};

}  // namespace headstart
