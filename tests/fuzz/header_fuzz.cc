// The head of a safetensors file: whatever is accepted lies inside the file.
#include <cstddef>
#include <cstdint>

#include "engine/model/safetensors.h"
#include "kernels/base/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::Span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  const auto file_size = static_cast<int64_t>(size);
  const auto header = headstart::ParseSafetensorsHeader(file, file_size, "model.safetensors");
  if (!header.ok()) return 0;
  int64_t data_bytes = 0;
  for (const auto& [name, entry] : header->tensors) {
    HEADSTART_CHECK(entry.begin >= 0 && entry.begin < entry.end);
    HEADSTART_CHECK(entry.end <= file_size - header->data_offset);
    data_bytes += entry.end - entry.begin;
  }
  HEADSTART_CHECK(header->data_offset + data_bytes == file_size);
  return 0;
}
