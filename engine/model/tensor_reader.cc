#include "engine/model/tensor_reader.h"

#include <openssl/sha.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

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

// kHashedBytes of a tensor, or what is left of it.
struct Part {
  const TensorRead* read;
  int64_t offset;  // in the tensor
  int64_t bytes;
};

// `spare`: where the bytes go when nobody wants them.
absl::Status ReadPart(const Part& part, std::vector<std::byte>& spare, Sha256& digest) {
  const StoredTensor& tensor = part.read->tensor;
  if (part.read->into == nullptr) spare.resize(kHashedBytes);
  std::byte* const into = part.read->into == nullptr ? spare.data() : part.read->into + part.offset;
  const auto bytes = static_cast<size_t>(part.bytes);
  HEADSTART_RETURN_IF_ERROR(tensor.file->Read(tensor.offset + part.offset, {into, bytes}));
  SHA256(reinterpret_cast<const unsigned char*>(into), bytes, digest.data());
  if (!AnyNonfinite(tensor.dtype, into, part.bytes)) return absl::OkStatus();
  const int64_t element =
      part.offset / DTypeBytes(tensor.dtype) + FirstNonfinite(tensor.dtype, into, part.bytes);
  return absl::InvalidArgumentError(
      absl::StrCat(tensor.Where(), ": element ", element, " is not finite"));
}

std::vector<Part> CutIntoParts(absl::Span<const TensorRead> reads) {
  std::vector<Part> parts;
  for (const TensorRead& read : reads) {
    for (int64_t at = 0; at < read.tensor.bytes; at += kHashedBytes) {
      parts.push_back({&read, at, std::min(kHashedBytes, read.tensor.bytes - at)});
    }
  }
  return parts;
}

// Runs `work` in up to `num_threads` threads, this one included; in fewer where no more are to be
// had. Returns when all are done.
void RunInThreads(int64_t num_threads, const std::function<void()>& work) {
  std::vector<std::thread> others;
  try {
    while (static_cast<int64_t>(others.size()) + 1 < num_threads) others.emplace_back(work);
  } catch (const std::system_error&) {  // those that there are take the work of the others
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

absl::StatusOr<std::vector<Sha256>> ReadTensors(absl::Span<const TensorRead> reads,
                                                int32_t num_threads) {
  const std::vector<Part> parts = CutIntoParts(reads);
  std::vector<Sha256> part_digests(parts.size());
  std::vector<absl::Status> results(parts.size());
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    std::vector<std::byte> spare;
    for (size_t i = next++; i < parts.size() && !failed; i = next++) {
      results[i] = ReadPart(parts[i], spare, part_digests[i]);
      if (!results[i].ok()) failed = true;
    }
  };
  RunInThreads(std::min<int64_t>(num_threads, static_cast<int64_t>(parts.size())), work);
  for (const absl::Status& result : results) HEADSTART_RETURN_IF_ERROR(result);
  std::vector<Sha256> digests(reads.size());
  const Sha256* begin = part_digests.data();
  for (size_t i = 0; i < reads.size(); ++i) {
    const int64_t count = (reads[i].tensor.bytes + kHashedBytes - 1) / kHashedBytes;
    SHA256(begin->data(), static_cast<size_t>(count) * sizeof(Sha256), digests[i].data());
    begin += count;
  }
  return digests;
}

}  // namespace headstart
