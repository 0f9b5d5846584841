#include "client/commands/token_ids.h"

#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace headstart {
namespace {

constexpr int64_t kMaxRandomTokens = 1 << 24;

}  // namespace

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text) {
  text = absl::StripAsciiWhitespace(text);
  const bool opened = absl::ConsumePrefix(&text, "[");
  if (absl::ConsumeSuffix(&text, "]") != opened)
    return absl::InvalidArgumentError("token ids: a bracket is missing");
  std::vector<uint32_t> ids;
  for (const absl::string_view word :
       absl::StrSplit(text, absl::ByAnyChar(opened ? ", \t\r\n" : " \t\r\n"), absl::SkipEmpty())) {
    uint32_t id;
    if (!absl::SimpleAtoi(word, &id)) {
      return absl::InvalidArgumentError(absl::StrCat("token_ids[", ids.size(), "]=\"",
                                                     absl::CHexEscape(word.substr(0, 40)),
                                                     "\" is no token id"));
    }
    ids.push_back(id);
  }
  if (ids.empty()) return absl::InvalidArgumentError("there are no token ids");
  return ids;
}

absl::StatusOr<std::vector<uint32_t>> ReadTokenIds(const std::string& path) {
  std::ifstream file;
  if (path != "-") file.open(path);
  std::istream& in = path == "-" ? std::cin : file;
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (path != "-" && !file.is_open()) return absl::NotFoundError(absl::StrCat("can't open ", path));
  return ParseTokenIds(text);
}

std::vector<uint32_t> RandomTokenIds(int64_t count, uint32_t vocab_size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> ids(count);
  for (uint32_t& id : ids) id = static_cast<uint32_t>(random() % vocab_size);
  return ids;
}

absl::StatusOr<RandomPrompt> ParseRandomPrompt(absl::string_view text) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(text, absl::MaxSplits(':', 1));
  RandomPrompt prompt;
  const bool seed_ok = parts.second.empty() || absl::SimpleAtoi(parts.second, &prompt.seed);
  if (!absl::SimpleAtoi(parts.first, &prompt.count) || !seed_ok || prompt.count < 1 ||
      prompt.count > kMaxRandomTokens) {
    return absl::InvalidArgumentError(absl::StrCat("random prompt \"", absl::CHexEscape(text),
                                                   "\" is not N or N:SEED with N up to 16777216"));
  }
  return prompt;
}

}  // namespace headstart
