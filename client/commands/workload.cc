#include "client/commands/workload.h"

#include <algorithm>

#include "client/commands/token_ids.h"

namespace headstart {
namespace {

enum Stream : uint64_t { kLengthStream = 1, kPriorityStream, kTokenStream };

uint64_t Draw(const Workload& workload, Stream stream, int64_t index) {
  return MixSeeds(MixSeeds(workload.seed, stream), static_cast<uint64_t>(index));
}

int64_t LengthOf(const Workload& workload, int64_t index) {
  if (workload.trace == nullptr) return workload.lengths.Draw(Draw(workload, kLengthStream, index));
  const auto& prompts = workload.trace->prompts;
  const int64_t place = index >= 0 ? index : (-1 - index) % static_cast<int64_t>(prompts.size());
  return prompts[place].num_tokens;
}

}  // namespace

int64_t Workload::longest() const {
  if (trace == nullptr) return lengths.largest();
  int64_t longest = 0;
  for (const TracePrompt& prompt : trace->prompts) longest = std::max(longest, prompt.num_tokens);
  return longest;
}

LoadPrompt PromptOf(const Workload& workload, int64_t index) {
  LoadPrompt prompt;
  prompt.priority =
      static_cast<int32_t>(workload.priorities.Draw(Draw(workload, kPriorityStream, index)));
  const int64_t length = LengthOf(workload, index);
  // Prompts of another length are no prefix of each other: the length is part of the seed.
  const uint64_t seed =
      MixSeeds(Draw(workload, kTokenStream, index), static_cast<uint64_t>(length));
  if (workload.text != nullptr) {
    prompt.token_ids.assign(workload.text->begin(), workload.text->begin() + length);
  } else if (workload.trace != nullptr && index >= 0) {
    const TracePrompt& traced = workload.trace->prompts[index];
    prompt.token_ids = TraceTokens(traced, workload.trace->block_tokens, workload.vocab_size, seed);
    prompt.prefix_names = PrefixNames(traced, workload.trace->block_tokens);
  } else {
    prompt.token_ids = RandomTokenIds(length, workload.vocab_size, seed);
  }
  return prompt;
}

}  // namespace headstart
