#include "kernels/cpu/reference_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/base/check.h"

namespace headstart::reference {
namespace {

float LoadElement(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(data)[i];
    case DType::kBF16:
      return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    case DType::kF16:
      return Float16ToFloat(static_cast<const uint16_t*>(data)[i]);
    case DType::kF8E4M3:
      return Float8E4M3ToFloat(static_cast<const uint8_t*>(data)[i]);
    case DType::kI32:
      break;
  }
  HEADSTART_CHECK(false);
  return 0;
}

void StoreElement(float value, void* data, DType dtype, int64_t i) {
  HEADSTART_CHECK(dtype == DType::kF32 || dtype == DType::kBF16);
  if (dtype == DType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<BFloat16*>(data)[i] = BFloat16(value);
  }
}

double InverseRms(const float* x, int64_t n, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{x[i]} * x[i];
  return 1.0 / std::sqrt(sum / static_cast<double>(n) + eps);
}

// Element of the pages that holds column 0 of one head's K (plane 0) or V (plane 1) of token t.
int64_t PageElement(const KvPages& pages, const int32_t* page_table, int64_t t, int plane,
                    int64_t kv_head) {
  const int64_t page = page_table[t / kBlockTokens];
  const int64_t row = kv_head * kBlockTokens + t % kBlockTokens;
  return page * pages.page_elements() + plane * pages.plane_elements() + row * pages.shape.head_dim;
}

// Calls visit(token row, column, page element) for every value of `num_tokens` tokens of one plane.
template <typename Visit>
void ForEachKvElement(const KvPages& pages, const int32_t* page_table, int64_t first_position,
                      int64_t num_tokens, int plane, Visit visit) {
  const int64_t head_dim = pages.shape.head_dim;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t head = 0; head < pages.shape.num_kv_heads; ++head) {
      const int64_t element = PageElement(pages, page_table, first_position + t, plane, head);
      for (int64_t c = 0; c < head_dim; ++c) visit(t, head * head_dim + c, element + c);
    }
  }
}

// The tokens that query `position` of head `h` attends to: all up to its own, or those of its kept
// blocks.
std::vector<int64_t> VisibleTokens(int64_t position, int32_t h, const BlockSelection* selection) {
  std::vector<int64_t> tokens;
  if (selection == nullptr) {
    for (int64_t u = 0; u <= position; ++u) tokens.push_back(u);
    return tokens;
  }
  const int64_t m = position / kBlockTokens;
  const int32_t proxy = h / (selection->num_heads / selection->num_proxies);
  for (int32_t i = 0; i < selection->Count(h, m); ++i) {
    const int64_t begin = selection->Ranking(proxy, m)[i] * kBlockTokens;
    for (int64_t u = begin; u < begin + kBlockTokens && u <= position; ++u) tokens.push_back(u);
  }
  return tokens;
}

// out[c] = sum over `tokens` of softmax(q . k / sqrt(d)) v[c], for one head.
void AttendOne(const float* q, const KvRows& kv, int64_t kv_col, int64_t head_dim,
               const std::vector<int64_t>& tokens, float* out) {
  std::vector<double> weights(tokens.size());
  double max_logit = -std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < tokens.size(); ++i) {
    const float* k = kv.k.Row(tokens[i]) + kv_col;
    double dot = 0;
    for (int64_t c = 0; c < head_dim; ++c) dot += double{q[c]} * k[c];
    weights[i] = dot / std::sqrt(static_cast<double>(head_dim));
    max_logit = std::max(max_logit, weights[i]);
  }
  double sum = 0;
  for (double& weight : weights) sum += weight = std::exp(weight - max_logit);
  std::vector<double> acc(head_dim);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const float* v = kv.v.Row(tokens[i]) + kv_col;
    for (int64_t c = 0; c < head_dim; ++c) acc[c] += weights[i] * v[c];
  }
  for (int64_t c = 0; c < head_dim; ++c) out[c] = static_cast<float>(acc[c] / sum);
}

}  // namespace

float RoundTo(float value, DType dtype) {
  HEADSTART_CHECK(dtype == DType::kF32 || dtype == DType::kBF16);
  return dtype == DType::kF32 ? value : static_cast<float>(BFloat16(value));
}

HostMatrix Load(const Matrix& matrix) {
  HostMatrix out(matrix.rows, matrix.cols);
  for (int64_t r = 0; r < matrix.rows; ++r) {
    for (int64_t c = 0; c < matrix.cols; ++c) {
      out.Row(r)[c] = LoadElement(matrix.data, matrix.dtype, r * matrix.row_stride + c);
    }
  }
  return out;
}

void Store(const HostMatrix& values, Matrix out) {
  HEADSTART_CHECK(values.rows == out.rows && values.cols == out.cols);
  for (int64_t r = 0; r < out.rows; ++r) {
    for (int64_t c = 0; c < out.cols; ++c) {
      StoreElement(values.Row(r)[c], out.data, out.dtype, r * out.row_stride + c);
    }
  }
}

HostMatrix Embed(absl::Span<const int32_t> ids, const HostMatrix& table) {
  HostMatrix out(static_cast<int64_t>(ids.size()), table.cols);
  for (int64_t r = 0; r < out.rows; ++r) {
    HEADSTART_CHECK(ids[r] >= 0 && ids[r] < table.rows);
    std::copy_n(table.Row(ids[r]), table.cols, out.Row(r));
  }
  return out;
}

HostMatrix RmsNorm(const HostMatrix& x, absl::Span<const float> weight, double eps) {
  HostMatrix out(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) {
    const double scale = InverseRms(x.Row(r), x.cols, eps);
    for (int64_t c = 0; c < x.cols; ++c) {
      out.Row(r)[c] = static_cast<float>(x.Row(r)[c] * scale * weight[c]);
    }
  }
  return out;
}

HostMatrix Linear(const HostMatrix& x, const HostMatrix& weight, absl::Span<const float> bias) {
  HEADSTART_CHECK(x.cols == weight.cols);
  HostMatrix out(x.rows, weight.rows);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t o = 0; o < weight.rows; ++o) {
      double sum = bias.empty() ? 0 : bias[o];
      for (int64_t c = 0; c < x.cols; ++c) sum += double{x.Row(r)[c]} * weight.Row(o)[c];
      out.Row(r)[o] = static_cast<float>(sum);
    }
  }
  return out;
}

void NormHeads(HostMatrix& x, int64_t first_col, int32_t num_heads, absl::Span<const float> weight,
               double eps) {
  const auto head_dim = static_cast<int64_t>(weight.size());
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t h = 0; h < num_heads; ++h) {
      float* head = x.Row(r) + first_col + h * head_dim;
      const double scale = InverseRms(head, head_dim, eps);
      for (int64_t c = 0; c < head_dim; ++c) {
        head[c] = static_cast<float>(head[c] * scale * weight[c]);
      }
    }
  }
}

void ApplyRope(HostMatrix& x, int64_t first_col, int32_t num_heads,
               absl::Span<const float> inv_freq, float scaling, int64_t first_position) {
  const auto half = static_cast<int64_t>(inv_freq.size());
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(first_position + r) * inv_freq[i];
      const double cosine = std::cos(double{angle}) * scaling;
      const double sine = std::sin(double{angle}) * scaling;
      for (int64_t h = 0; h < num_heads; ++h) {
        float* head = x.Row(r) + first_col + h * 2 * half;
        const double a = head[i];
        const double b = head[i + half];
        head[i] = static_cast<float>(a * cosine - b * sine);
        head[i + half] = static_cast<float>(b * cosine + a * sine);
      }
    }
  }
}

HostMatrix SwiGlu(const HostMatrix& gate_up) {
  HostMatrix out(gate_up.rows, gate_up.cols / 2);
  for (int64_t r = 0; r < out.rows; ++r) {
    for (int64_t c = 0; c < out.cols; ++c) {
      const double gate = gate_up.Row(r)[c];
      const double up = gate_up.Row(r)[c + out.cols];
      out.Row(r)[c] = static_cast<float>(gate / (1.0 + std::exp(-gate)) * up);
    }
  }
  return out;
}

double LogProb(absl::Span<const float> logits, int32_t id) {
  const double max_logit = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max_logit);
  return logits[id] - max_logit - std::log(sum);
}

void StoreKv(const KvRows& rows, int64_t first_position, const KvPages& pages,
             const int32_t* page_table) {
  for (const int plane : {0, 1}) {
    const HostMatrix& source = plane == 0 ? rows.k : rows.v;
    ForEachKvElement(pages, page_table, first_position, source.rows, plane,
                     [&](int64_t t, int64_t c, int64_t element) {
                       StoreElement(source.Row(t)[c], pages.pages, pages.dtype, element);
                     });
  }
}

KvRows LoadKv(const KvPages& pages, const int32_t* page_table, int64_t num_tokens) {
  const int64_t cols = int64_t{pages.shape.num_kv_heads} * pages.shape.head_dim;
  KvRows rows{HostMatrix(num_tokens, cols), HostMatrix(num_tokens, cols)};
  for (const int plane : {0, 1}) {
    HostMatrix& target = plane == 0 ? rows.k : rows.v;
    ForEachKvElement(pages, page_table, 0, num_tokens, plane,
                     [&](int64_t t, int64_t c, int64_t element) {
                       target.Row(t)[c] = LoadElement(pages.pages, pages.dtype, element);
                     });
  }
  return rows;
}

uint8_t NearestFloat8E4M3(float value) {
  uint8_t nearest = 0;
  for (uint8_t number = 1; number < 0x7f; ++number) {
    const auto distance = [&](uint8_t candidate) {
      return std::abs(double{Float8E4M3ToFloat(candidate)} - std::abs(double{value}));
    };
    const bool wins_tie = distance(number) == distance(nearest) && number % 2 == 0;
    if (distance(number) < distance(nearest) || wins_tie) nearest = number;
  }
  return std::signbit(value) ? nearest | 0x80 : nearest;
}

std::vector<uint8_t> QuantizePage(const KvPages& pages, int64_t page, int64_t num_tokens) {
  const HeadShape& shape = pages.shape;
  const int64_t head_elements = kBlockTokens * shape.head_dim;
  std::vector<uint8_t> out(static_cast<size_t>(Fp8PageBytes(shape)));
  for (int64_t plane = 0; plane < int64_t{2} * shape.num_kv_heads; ++plane) {
    const int64_t first = page * pages.page_elements() + plane * head_elements;
    const auto element = [&](int64_t i) {
      return LoadElement(pages.pages, pages.dtype, first + i);
    };
    const int64_t count = num_tokens * shape.head_dim;
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(element(i)));
    const float scale = largest / kMaxFloat8E4M3;
    std::memcpy(out.data() + plane * int64_t{sizeof(float)}, &scale, sizeof(scale));
    uint8_t* const numbers = out.data() + Fp8ScaleBytes(shape) + plane * head_elements;
    for (int64_t i = 0; i < count; ++i) {
      numbers[i] = NearestFloat8E4M3(element(i) / (scale > 0 ? scale : INFINITY));
    }
  }
  return out;
}

HostMatrix Attention(const HostMatrix& q, const KvRows& kv, const HeadShape& shape,
                     int64_t first_position, const BlockSelection* selection) {
  HostMatrix out(q.rows, q.cols);
  for (int64_t r = 0; r < q.rows; ++r) {
    for (int32_t h = 0; h < shape.num_heads; ++h) {
      const int64_t col = int64_t{h} * shape.head_dim;
      const int64_t kv_col = int64_t{h / shape.group_size()} * shape.head_dim;
      const auto tokens = VisibleTokens(first_position + r, h, selection);
      AttendOne(q.Row(r) + col, kv, kv_col, shape.head_dim, tokens, out.Row(r) + col);
    }
  }
  return out;
}

}  // namespace headstart::reference
