#include "tests/fuzz/live/hpack.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"

namespace headstart::testing {
namespace {

// Section 5.1.
std::string HpackInteger(uint8_t first, int prefix_bits, uint64_t value) {
  const uint64_t most = (1u << prefix_bits) - 1;
  if (value < most) return std::string(1, static_cast<char>(first | value));
  std::string out(1, static_cast<char>(first | most));
  for (value -= most; value >= 128; value >>= 7) out.push_back(static_cast<char>(value | 128));
  out.push_back(static_cast<char>(value));
  return out;
}

// Section 5.2. With mischief the length lies, or what is no Huffman code says that it is one.
std::string HpackString(Random& random, int64_t mischief, const std::string& text) {
  const bool huffman = random.Percent(mischief);
  const uint64_t lie = random.Percent(mischief) ? random.Between(1, 1 << random.Between(1, 28)) : 0;
  return absl::StrCat(HpackInteger(huffman ? 0x80 : 0, 7, text.size() + lie), text);
}

// Literals: 0x40 goes into the dynamic table, 0x00 does not, 0x10 never does.
std::string Literal(Random& random, int64_t mischief, const std::string& name,
                    const std::string& value) {
  constexpr uint8_t kKinds[] = {0x40, 0x00, 0x10};
  return absl::StrCat(std::string(1, static_cast<char>(OneOf(random, kKinds))),
                      HpackString(random, mischief, name), HpackString(random, mischief, value));
}

// What refers to tables: entries that are there, that are not, and new sizes of the table.
std::string StrangeItem(Random& random) {
  constexpr uint64_t kIndices[] = {0, 1, 2, 61, 62, 63, 127, 128, 1 << 20, ~0ull >> 8};
  switch (random.Between(0, 3)) {
    case 0:
      return HpackInteger(0x80, 7, OneOf(random, kIndices));
    case 1:
      return HpackInteger(0x20, 5, OneOf(random, kIndices));
    case 2:
      return absl::StrCat(HpackInteger(0x40, 6, OneOf(random, kIndices)),
                          HpackString(random, 0, "value"));
    default:
      return std::string(static_cast<size_t>(random.Between(1, 12)), '\xff');  // no end
  }
}

std::string HostileValue(Random& random) {
  constexpr const char* kValues[] = {
      "",          "GET",          "https",
      "gzip",      "deflate,gzip", "application/json",
      "99999999H", "0n",           "1n",
      "-1S",       "9999999999S",  "50m",
      "chunked",   "!not base64!", "AAAA",
      "a\r\nb",    "\xff\xfe",     "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"};
  if (random.Percent(15)) return std::string(static_cast<size_t>(random.Between(1, 20000)), 'v');
  return OneOf(random, kValues);
}

std::pair<std::string, std::string> ExtraHeader(Random& random) {
  constexpr const char* kNames[] = {"grpc-timeout",
                                    "grpc-encoding",
                                    "grpc-accept-encoding",
                                    "x-request-id",
                                    "traceparent",
                                    "tracestate",
                                    "fuzz-bin",
                                    "grpc-trace-bin",
                                    "cookie",
                                    "content-length",
                                    "Upper-Case",
                                    "connection",
                                    "transfer-encoding",
                                    ":status",
                                    ":protocol",
                                    "",
                                    "bad name",
                                    "grpc-previous-rpc-attempts",
                                    "host",
                                    "expect"};
  return {OneOf(random, kNames), HostileValue(random)};
}

}  // namespace

HeaderList HostileHeaders(Random& random, int64_t mischief, const std::string& path) {
  const HeaderList right = {{":method", "POST"}, {":scheme", "http"},
                            {":path", path},     {":authority", "fuzzed"},
                            {"te", "trailers"},  {"content-type", "application/grpc"}};
  HeaderList headers;
  for (const auto& header : right) {
    const int64_t kind = random.Percent(mischief) ? random.Between(1, 3) : 0;
    if (kind == 1) continue;
    headers.push_back(header);
    if (kind == 2) headers.push_back(header);
    if (kind == 3) headers.back().second = HostileValue(random);
  }
  while (random.Percent(10 + mischief)) headers.push_back(ExtraHeader(random));
  if (random.Percent(mischief)) std::reverse(headers.begin(), headers.end());
  return headers;
}

std::string HpackBlock(Random& random, int64_t mischief, const HeaderList& headers) {
  std::string block;
  for (const auto& [name, value] : headers) {
    if (random.Percent(mischief)) block += StrangeItem(random);
    block += Literal(random, mischief / 4, name, value);
  }
  return block;
}

}  // namespace headstart::testing
