// One prompt: what is asked, and what came of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "engine/attention_options.h"
#include "engine/run/sampling.h"
#include "engine/schedule/page_hash.h"
#include "engine/ship/kv_part.h"
#include "kernels/attention_params.h"
#include "kernels/base/instant.h"

namespace headstart {

// KV that is kept after compute, to be fetched.
struct DetachedKv {
  absl::Duration lease = absl::ZeroDuration();  // zero: the engine's default
  // Parts that will be fetched: together everything, or none.
  std::vector<KvPart> readers;
  // Who may fetch, renew and release: the name in a client's certificate. Empty: whoever knows the
  // id.
  std::string owner;
};

// Which pages of the prefix cache may stand for the start of a prompt. The names of pages begin
// with `cache_root`: equal roots, salt included, mean that pages may be shared. The empty one is a
// root, too.
struct PrefixCaching {
  std::optional<std::string> cache_root;  // of the pages that may be found; absent: none are
  bool keeps_pages = true;  // those of this prompt may be found by others, under the same root
  // Pages behind pieces of any size may be found, as they do not depend on it: those of dense
  // attention.
  bool any_page = false;
  std::string held_pages;  // names of pages that the client has: 16 bytes each
};

struct PrefillRequest {
  std::string request_id;
  std::vector<int32_t> token_ids;
  AttentionPreset preset =
      AttentionPreset::kBalanced;  // what `attention` started from, for provenance
  ProxyAttnOptions attention;
  SamplingOptions sampling;
  // Equal in all attempts at the same call; empty: there is one only.
  std::string attempt_key;
  Instant deadline = Instant::InfiniteFuture();
  int32_t priority = 0;     // higher ones run first
  int64_t skip_tokens = 0;  // their KV is computed, not shipped
  // How the KV is shipped: as it is computed (none), or kF8E4M3.
  std::optional<DType> kv_dtype;
  PrefixCaching prefix;
  std::vector<PageHash> page_names;  // see Engine::NamePages
  std::optional<DetachedKv> detached;
  std::string manifest;  // handed to everyone who reads the KV; the engine does not look at it

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
};

// One piece of a prompt, as it ran: in time order the pieces cover the prompt.
struct PieceRun {
  int64_t first_position = 0;
  int64_t num_tokens = 0;
  bool from_cache = false;                  // copied, not computed
  Instant begin = Instant::InfinitePast();  // when its step was made
  Instant end = Instant::InfinitePast();    // and was done
};

struct PrefillResult {
  SampledToken first_token;
  int64_t cached_tokens = 0;  // from the prefix cache; the others were computed
  std::string page_hashes;    // names of the prompt's pages, 16 bytes each, as far as they have one
  std::vector<float> layer_density;  // executed / causal blocks
  // By layer. The last one attends only for the rows that the first token needs.
  std::vector<int64_t> layer_executed_blocks;
  std::vector<int64_t> layer_causal_blocks;
  // What the heads' budgets ask for, before the dense tail and dense fallbacks; what ran where no
  // budget was estimated.
  std::vector<int64_t> layer_predicted_blocks;
  // [num_layers][H]: share of the causal blocks that a head's budget asks for; 0 where none was
  // estimated.
  std::vector<float> layer_head_budget;
  int64_t executed_blocks = 0;
  int64_t causal_blocks = 0;
  int64_t dense_fallbacks = 0;
  double selection_seconds = 0;
  double attention_seconds = 0;
  // In steps of which it was a part, the two above included.
  double compute_seconds = 0;
  // Between pieces, because the host memory was full of KV that nobody had taken.
  double room_wait_seconds = 0;
  double gave_way_seconds = 0;                   // between begin and end: others ran
  std::optional<absl::Duration> predicted_ttft;  // when it was accepted
  Instant accepted_at = Instant::InfinitePast();
  Instant started_at = Instant::InfinitePast();   // compute began
  Instant computed_at = Instant::InfinitePast();  // and ended
  std::vector<PieceRun> pieces;
};

enum class RequestState : uint8_t {
  kWaiting,    // for its first piece
  kComputing,  // a piece of it runs
  kPaused,     // between pieces: others run, or host memory is full
  kShipping,   // computed, its KV is on its way
  kKept,       // computed, its KV has a lease
};

// What a request that is in is doing now.
struct RequestView {
  std::string request_id;
  int64_t num_tokens = 0;
  int32_t priority = 0;
  int64_t position = 0;  // of the next token that is neither computed nor being computed
  Instant accepted_at = Instant::InfinitePast();
  RequestState state = RequestState::kWaiting;
};

}  // namespace headstart
