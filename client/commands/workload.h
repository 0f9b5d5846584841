// The prompts of a load: which tokens and what priority the one of an index has.
#pragma once

#include <cstdint>
#include <vector>

#include "client/commands/mix.h"
#include "client/commands/trace.h"

namespace headstart {

struct Workload {
  Mix lengths = Mix::Of(1024);
  const Trace* trace = nullptr;                 // instead of lengths
  const std::vector<uint32_t>* text = nullptr;  // prompts are its beginning; null: random ids
  Mix priorities = Mix::Of(0);
  uint32_t vocab_size = 0;
  uint64_t seed = 0;

  int64_t longest() const;
};

struct LoadPrompt {
  std::vector<uint32_t> token_ids;
  int32_t priority = 0;
  std::vector<uint64_t> prefix_names;  // of a trace
};

// The prompt of an index, always the same. Those below 0 are for warming up: they share nothing
// with the others but, where there is one, the text. REQUIRES: of a trace, index is less than its
// length.
LoadPrompt PromptOf(const Workload& workload, int64_t index);

}  // namespace headstart
