#include "engine/model/tensor_scan.h"

#include <isa-l/crc.h>

#include <algorithm>
#include <cstring>

namespace headstart {
namespace {

constexpr int64_t kPieceBytes = 256 << 10;  // small enough to be in cache for the second look

// Whether some word has all bits of `exponent` set. `data` need not be aligned.
template <typename Word>
bool AnyNonfinite(const std::byte* data, int64_t count, Word exponent) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, data + i * static_cast<int64_t>(sizeof(Word)), sizeof(Word));
    found |= (word & exponent) == exponent;
  }
  return found;
}

bool AnyNonfinite(DType dtype, const std::byte* data, int64_t bytes) {
  switch (dtype) {
    case DType::kF32:
      return AnyNonfinite<uint32_t>(data, bytes / 4, 0x7f800000u);
    case DType::kBF16:
      return AnyNonfinite<uint16_t>(data, bytes / 2, 0x7f80u);
    case DType::kF16:
      return AnyNonfinite<uint16_t>(data, bytes / 2, 0x7c00u);
    case DType::kI32:
    case DType::kF8E4M3:  // no weights
      return false;
  }
  return false;
}

int64_t FirstNonfinite(DType dtype, const std::byte* data, int64_t bytes) {
  const int64_t width = DTypeBytes(dtype);
  for (int64_t at = 0; at < bytes; at += width) {
    if (AnyNonfinite(dtype, data + at, width)) return at / width;
  }
  return -1;
}

}  // namespace

TensorScan ScanTensor(const StoredTensor& tensor) {
  TensorScan scan;
  uint32_t crc = 0xffffffffu;
  for (int64_t at = 0; at < tensor.bytes; at += kPieceBytes) {
    const int64_t piece = std::min(kPieceBytes, tensor.bytes - at);
    const std::byte* data = tensor.data + at;
    // ISA-L only reads, though its signature does not say so.
    auto* bytes = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(data));
    crc = crc32_iscsi(bytes, static_cast<int>(piece), crc);
    if (scan.first_nonfinite < 0 && AnyNonfinite(tensor.dtype, data, piece)) {
      scan.first_nonfinite =
          at / DTypeBytes(tensor.dtype) + FirstNonfinite(tensor.dtype, data, piece);
    }
  }
  scan.crc32c = ~crc;
  return scan;
}

}  // namespace headstart
