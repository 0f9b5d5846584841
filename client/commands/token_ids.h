// Where the commands get their prompts from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headstart {

// Ids as a JSON array, or apart by white space. INVALID_ARGUMENT names the first that is no id;
// empty text is one too.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text);

// Parses a file; "-" is standard input.
absl::StatusOr<std::vector<uint32_t>> ReadTokenIds(const std::string& path);

// Evenly drawn from [0, vocab_size); equal seeds give equal ids.
std::vector<uint32_t> RandomTokenIds(int64_t count, uint32_t vocab_size, uint64_t seed);

// "N:SEED" or "N" (seed 0).
struct RandomPrompt {
  int64_t count = 0;
  uint64_t seed = 0;
};
absl::StatusOr<RandomPrompt> ParseRandomPrompt(absl::string_view text);

}  // namespace headstart
