// config.json: no text may crash the parser, and what it accepts must be usable.
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "engine/model/model_config.h"
#include "kernels/base/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = headstart::ParseModelConfig(text, "config.json");
  if (!config.ok()) return 0;
  HEADSTART_CHECK(config->heads.num_heads % config->heads.num_kv_heads == 0);
  HEADSTART_CHECK(config->max_positions >= 1);
  HEADSTART_CHECK(config->KvBytesPerToken(headstart::DType::kF32) > 0);
  for (const float f : headstart::InverseFrequencies(config->rope, config->heads.head_dim)) {
    HEADSTART_CHECK(std::isfinite(f) && f >= 0.0f);
  }
  return 0;
}
