#include "kernels/cpu/convert.h"

#include <cstring>

#include "kernels/base/check.h"
#include "kernels/cpu/parallel.h"

namespace headstart {
namespace {

constexpr int64_t kGrain = int64_t{1} << 18;

float ToFloat(float x) { return x; }
float ToFloat(BFloat16 x) { return static_cast<float>(x); }
float ToFloat(uint16_t half) { return Float16ToFloat(half); }

template <typename From, typename To>
void Convert(const void* in, int64_t count, void* out, int32_t num_threads) {
  const From* x = static_cast<const From*>(in);
  To* y = static_cast<To*>(out);
  ParallelForRanges(num_threads, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = To(ToFloat(x[i]));
  });
}

template <typename To>
void ConvertTo(const void* in, DType from, int64_t count, void* out, int32_t num_threads) {
  switch (from) {
    case DType::kF32:
      return Convert<float, To>(in, count, out, num_threads);
    case DType::kBF16:
      return Convert<BFloat16, To>(in, count, out, num_threads);
    case DType::kF16:
      return Convert<uint16_t, To>(in, count, out, num_threads);
    case DType::kI32:
    case DType::kF8E4M3:
      break;
  }
  HEADSTART_CHECK(false);
}

}  // namespace

void ConvertElements(const void* in, DType from, int64_t count, void* out, DType to,
                     int32_t num_threads) {
  HEADSTART_CHECK(to == DType::kF32 || to == DType::kBF16);
  if (from == to) {
    std::memcpy(out, in, count * DTypeBytes(to));
  } else if (to == DType::kF32) {
    ConvertTo<float>(in, from, count, out, num_threads);
  } else {
    ConvertTo<BFloat16>(in, from, count, out, num_threads);
  }
}

}  // namespace headstart
