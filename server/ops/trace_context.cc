#include "server/ops/trace_context.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"

namespace headstart {
namespace {

// version-trace-parent-flags
constexpr absl::string_view kVersion00 = "00-";
constexpr size_t kTraceBegin = 3, kTraceDigits = 32;
constexpr size_t kParentBegin = 36, kParentDigits = 16;
constexpr size_t kFlagsBegin = 53, kFlagsDigits = 2;
constexpr size_t kLength = kFlagsBegin + kFlagsDigits;
constexpr uint8_t kSampled = 1;

// The bytes of lower-case digits; empty where one is none.
std::string FromHex(absl::string_view digits) {
  const bool good = std::all_of(digits.begin(), digits.end(), [](char c) {
    return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f');
  });
  return good ? absl::HexStringToBytes(digits) : "";
}

bool IsZero(const std::string& id) { return id.find_first_not_of('\0') == std::string::npos; }

std::string RandomBytes(size_t count) {
  thread_local absl::BitGen random;
  std::string bytes;
  while (bytes.size() < count) {
    const auto number = absl::Uniform<uint64_t>(absl::IntervalClosed, random, 1, UINT64_MAX);
    bytes.append(reinterpret_cast<const char*>(&number), sizeof(number));
  }
  return bytes;
}

}  // namespace

std::optional<TraceContext> ParseTraceParent(absl::string_view text) {
  if (text.size() != kLength || text.substr(0, kTraceBegin) != kVersion00 ||
      text[kParentBegin - 1] != '-' || text[kFlagsBegin - 1] != '-') {
    return std::nullopt;
  }
  TraceContext context;
  context.trace_id = FromHex(text.substr(kTraceBegin, kTraceDigits));
  context.span_id = FromHex(text.substr(kParentBegin, kParentDigits));
  const std::string flags = FromHex(text.substr(kFlagsBegin, kFlagsDigits));
  if (IsZero(context.trace_id) || IsZero(context.span_id) || flags.empty()) return std::nullopt;
  context.sampled = (static_cast<uint8_t>(flags[0]) & kSampled) != 0;
  return context;
}

std::string NewTraceId() { return RandomBytes(16); }
std::string NewSpanId() { return RandomBytes(8); }

}  // namespace headstart
