#include "client/fp8.h"

#include <bit>
#include <cstring>

namespace headstart {
namespace {

// Without branches, so that it runs in lanes. Put at the place of a float's exponent and mantissa,
// those of a number mean 2^-120 of it, also where it is subnormal.
inline uint32_t ProductBits(char number, float scale) {
  const auto bits = static_cast<uint32_t>(static_cast<uint8_t>(number));
  const uint32_t magnitude = bits & 0x7fu;
  const float value = std::bit_cast<float>((bits & 0x80u) << 24 | magnitude << 20) * 0x1p120f;
  const uint32_t product = std::bit_cast<uint32_t>(value * scale);
  return magnitude == 0x7fu ? 0x7fc00000u : product;
}

}  // namespace

void MultiplyOutToF32(const char* numbers, int64_t count, float scale, std::byte* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = ProductBits(numbers[i], scale);
    std::memcpy(out + i * 4, &bits, sizeof(bits));
  }
}

void MultiplyOutToBF16(const char* numbers, int64_t count, float scale, std::byte* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = ProductBits(numbers[i], scale);
    const auto rounded = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    std::memcpy(out + i * 2, &rounded, sizeof(rounded));
  }
}

}  // namespace headstart
