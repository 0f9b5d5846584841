// model.safetensors.index.json: every shard that is accepted is a plain name in the folder.
#include <cstddef>
#include <cstdint>
#include <string>

#include "engine/model/safetensors.h"
#include "kernels/base/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto index = headstart::ParseSafetensorsIndex(text, "model.safetensors.index.json");
  if (!index.ok()) return 0;
  for (const auto& [tensor, shard] : *index) {
    HEADSTART_CHECK(shard.find('/') == std::string::npos);
    HEADSTART_CHECK(shard.find('\0') == std::string::npos);
    HEADSTART_CHECK(shard[0] != '.');
  }
  return 0;
}
