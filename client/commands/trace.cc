#include "client/commands/trace.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "client/commands/mix.h"
#include "client/commands/token_ids.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr int64_t kMaxTraceTokens = 1 << 24;  // of a prompt
constexpr double kMaxTimestampMs = 1e15;
constexpr size_t kMaxLineBytes = 4 << 20;
constexpr uint64_t kBlockTokensSeed = 0x68656164'73746172u;
// Where prefixes of own tokens begin, apart from those of hash ids.
constexpr uint64_t kFirstPrefix = 1;

absl::StatusOr<std::vector<uint64_t>> ParseHashIds(const nlohmann::json& line, int64_t most) {
  std::vector<uint64_t> ids;
  const auto field = line.find("hash_ids");
  if (field == line.end()) return ids;
  if (!field->is_array()) return absl::InvalidArgumentError("hash_ids is no array");
  if (field->size() > static_cast<size_t>(most)) {
    return absl::InvalidArgumentError(
        absl::StrCat("hash_ids has ", field->size(), " ids, input_length has ", most, " blocks"));
  }
  for (const nlohmann::json& id : *field) {
    if (!id.is_number_integer())
      return absl::InvalidArgumentError(
          absl::StrCat("hash_ids[", ids.size(), "] is no whole number"));
    ids.push_back(id.get<uint64_t>());
  }
  return ids;
}

absl::StatusOr<TracePrompt> ParseLine(const std::string& text, int64_t block_tokens) {
  if (text.size() > kMaxLineBytes)
    return absl::InvalidArgumentError(
        absl::StrCat("has ", text.size(), " bytes, at most ", kMaxLineBytes));
  const nlohmann::json line = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!line.is_object()) return absl::InvalidArgumentError("is no JSON object");
  const nlohmann::json timestamp = line.value("timestamp", nlohmann::json());
  if (!timestamp.is_number() || !(timestamp.get<double>() >= 0) ||
      timestamp.get<double>() > kMaxTimestampMs) {
    return absl::InvalidArgumentError("timestamp is no number of milliseconds, at least 0");
  }
  const nlohmann::json length = line.value("input_length", nlohmann::json());
  if (!length.is_number_integer() || length.get<double>() < 1 ||
      length.get<double>() > kMaxTraceTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("input_length is no whole number in [1, ", kMaxTraceTokens, "]"));
  }
  TracePrompt prompt;
  prompt.due = absl::Milliseconds(timestamp.get<double>());
  prompt.num_tokens = length.get<int64_t>();
  HEADSTART_ASSIGN_OR_RETURN(
      prompt.hash_ids, ParseHashIds(line, (prompt.num_tokens + block_tokens - 1) / block_tokens));
  return prompt;
}

// Times from the first one on, faster by `speed`; in order.
void PlanTimes(double speed, std::vector<TracePrompt>* prompts) {
  std::stable_sort(prompts->begin(), prompts->end(),
                   [](const TracePrompt& a, const TracePrompt& b) { return a.due < b.due; });
  if (prompts->empty()) return;
  const absl::Duration first = prompts->front().due;
  for (TracePrompt& prompt : *prompts) prompt.due = (prompt.due - first) / speed;
}

// False when the prompt is to be left out.
bool FitLength(const TraceOptions& options, TracePrompt* prompt, Trace* trace) {
  if (options.max_tokens == 0 || prompt->num_tokens <= options.max_tokens) return true;
  ++(options.skip_long ? trace->num_skipped : trace->num_cut);
  if (options.skip_long) return false;
  prompt->num_tokens = options.max_tokens;
  const int64_t blocks = (prompt->num_tokens + options.block_tokens - 1) / options.block_tokens;
  if (static_cast<int64_t>(prompt->hash_ids.size()) > blocks) prompt->hash_ids.resize(blocks);
  return true;
}

}  // namespace

absl::StatusOr<Trace> ParseTrace(std::istream& in, const TraceOptions& options) {
  std::vector<TracePrompt> prompts;
  std::string text;
  for (int64_t number = 1; std::getline(in, text); ++number) {
    if (absl::StripAsciiWhitespace(text).empty()) continue;
    absl::StatusOr<TracePrompt> prompt = ParseLine(text, options.block_tokens);
    if (!prompt.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("line ", number, ": ",
                                                     prompt.status().message(), ": \"",
                                                     absl::CHexEscape(text.substr(0, 80)), "\""));
    }
    prompts.push_back(*std::move(prompt));
  }
  PlanTimes(options.speed, &prompts);
  Trace trace{.block_tokens = options.block_tokens, .prompts = {}};
  for (TracePrompt& prompt : prompts) {
    const bool full = options.max_prompts > 0 &&
                      static_cast<int64_t>(trace.prompts.size()) == options.max_prompts;
    if (full || prompt.due >= options.duration) break;
    if (FitLength(options, &prompt, &trace)) trace.prompts.push_back(std::move(prompt));
  }
  if (trace.prompts.empty())
    return absl::InvalidArgumentError(
        absl::StrCat("the trace has no prompt, ", trace.num_skipped, " were left out as too long"));
  return trace;
}

absl::StatusOr<Trace> ReadTrace(const std::string& path, const TraceOptions& options) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("can't open ", path));
  absl::StatusOr<Trace> trace = ParseTrace(file, options);
  if (trace.ok()) return trace;
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", trace.status().message()));
}

std::vector<uint32_t> TraceTokens(const TracePrompt& prompt, int64_t block_tokens,
                                  uint32_t vocab_size, uint64_t seed) {
  std::vector<uint32_t> ids;
  ids.reserve(prompt.num_tokens);
  const auto append = [&](int64_t count, uint64_t of) {
    const std::vector<uint32_t> more = RandomTokenIds(count, vocab_size, of);
    ids.insert(ids.end(), more.begin(), more.end());
  };
  for (const uint64_t id : prompt.hash_ids) {
    const int64_t rest = prompt.num_tokens - static_cast<int64_t>(ids.size());
    append(std::min(rest, block_tokens), MixSeeds(kBlockTokensSeed, id));
  }
  append(prompt.num_tokens - static_cast<int64_t>(ids.size()), seed);
  return ids;
}

std::vector<uint64_t> PrefixNames(const TracePrompt& prompt, int64_t block_tokens) {
  std::vector<uint64_t> names;
  uint64_t name = kFirstPrefix;
  for (const uint64_t id : prompt.hash_ids) {
    if (static_cast<int64_t>(names.size() + 1) * block_tokens > prompt.num_tokens) break;
    names.push_back(name = MixSeeds(name, id));
  }
  return names;
}

void HeldPrefixes::Add(const std::vector<uint64_t>& names) {
  absl::MutexLock lock(&mutex_);
  held_.insert(names.begin(), names.end());
}

int64_t HeldPrefixes::CountHeld(const std::vector<uint64_t>& names) const {
  absl::MutexLock lock(&mutex_);
  const auto missing = std::find_if_not(names.begin(), names.end(),
                                        [&](uint64_t name) { return held_.contains(name); });
  return missing - names.begin();
}

}  // namespace headstart
