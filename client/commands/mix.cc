#include "client/commands/mix.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace headstart {

uint64_t MixSeeds(uint64_t a, uint64_t b) {
  uint64_t z = a + (b + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

absl::StatusOr<Mix> Mix::Parse(const std::vector<std::string>& words, int64_t least, int64_t most) {
  if (words.empty()) return absl::InvalidArgumentError("there is no value to draw from");
  std::vector<Part> parts;
  bool weighted = false;
  for (const std::string& word : words) {
    const std::vector<absl::string_view> fields = absl::StrSplit(word, absl::MaxSplits(':', 1));
    Part part;
    const bool value_ok =
        absl::SimpleAtoi(fields[0], &part.value) && part.value >= least && part.value <= most;
    const bool weight_ok = fields.size() == 1 || (absl::SimpleAtod(fields[1], &part.weight) &&
                                                  std::isfinite(part.weight) && part.weight > 0);
    if (!value_ok || !weight_ok) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", absl::CHexEscape(word.substr(0, 40)),
                       "\" is not VALUE or VALUE:WEIGHT with VALUE in [", least, ", ", most,
                       "] and WEIGHT > 0"));
    }
    weighted |= fields.size() > 1;
    parts.push_back(part);
  }
  return Mix(std::move(parts), weighted);
}

int64_t Mix::largest() const {
  return std::max_element(parts_.begin(), parts_.end(),
                          [](const Part& a, const Part& b) { return a.value < b.value; })
      ->value;
}

int64_t Mix::Draw(uint64_t random) const {
  double total = 0;
  for (const Part& part : parts_) total += part.weight;
  double rest = static_cast<double>(random >> 11) * 0x1p-53 * total;
  for (const Part& part : parts_) {
    rest -= part.weight;
    if (rest < 0) return part.value;
  }
  return parts_.back().value;
}

}  // namespace headstart
