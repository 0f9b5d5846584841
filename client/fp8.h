// What fp8 KV stands for: OCP E4M3 numbers times a scale.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headstart {

// `count` numbers at `numbers`, each times `scale`, to `out`, which need not be aligned: the fp32
// product, and of bf16 that rounded to nearest even. 0x7f and 0xff are NaN.
void MultiplyOutToF32(const char* numbers, int64_t count, float scale, std::byte* out);
void MultiplyOutToBF16(const char* numbers, int64_t count, float scale, std::byte* out);

}  // namespace headstart
