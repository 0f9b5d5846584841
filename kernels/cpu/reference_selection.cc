#include "kernels/cpu/reference_selection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/base/check.h"

namespace headstart::reference {
namespace {

// A selection of the piece's rows that nothing has been written to.
BlockSelection Layout(const SelectionInput& input, const ProxyAttnOptions& options) {
  HEADSTART_CHECK(input.first_position % kBlockTokens == 0 && input.q.rows > 0);
  HEADSTART_CHECK(input.k.rows == input.first_position + input.q.rows);
  BlockSelection selection;
  selection.num_heads = input.shape.num_heads;
  selection.num_proxies = options.num_proxies;
  selection.first_row = input.first_position / kBlockTokens;
  selection.num_rows = NumBlocks(input.k.rows) - selection.first_row;
  selection.counts.resize(selection.num_heads * selection.num_rows);
  return selection;
}

double Dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{a[i]} * b[i];
  return sum;
}

// Logarithms of softmax(q . k / sqrt(d)) over the first `num_keys` rows of one head of k.
std::vector<double> LogSoftmax(const float* q, const HostMatrix& k, int64_t head, int64_t d,
                               int64_t num_keys) {
  std::vector<double> x(num_keys);
  for (int64_t u = 0; u < num_keys; ++u) {
    x[u] = Dot(q, k.Row(u) + head * d, d) / std::sqrt(static_cast<double>(d));
  }
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double logit : x) sum += std::exp(logit - max);
  for (double& logit : x) logit -= max + std::log(sum);
  return x;
}

bool DenseByRule(const SelectionInput& input, const ProxyAttnOptions& options) {
  const auto& layers = options.dense_layers;
  return !options.enabled || input.k.rows <= options.dense_below_tokens ||
         std::find(layers.begin(), layers.end(), input.layer) != layers.end();
}

// The always-kept blocks of row m, in order: the diagonal, the sink, local ones nearest first.
std::vector<int32_t> ForcedBlocks(int64_t m, const ProxyAttnOptions& options) {
  std::vector<int32_t> forced = {static_cast<int32_t>(m)};
  const auto add = [&](int64_t block) {
    if (std::find(forced.begin(), forced.end(), block) == forced.end()) {
      forced.push_back(static_cast<int32_t>(block));
    }
  };
  if (options.sink_blocks > 0) add(0);
  for (int64_t i = 1; i <= std::min<int64_t>(options.local_blocks, m); ++i) add(m - i);
  return forced;
}

// Blocks 0..m: forced ones first, then by falling score, ties to the lower index.
void RankRow(int64_t m, const ProxyAttnOptions& options, const double* scores, int32_t* ranking) {
  const std::vector<int32_t> forced = ForcedBlocks(m, options);
  std::copy(forced.begin(), forced.end(), ranking);
  std::vector<int32_t> rest;
  for (int32_t n = 0; n <= m; ++n) {
    if (std::find(forced.begin(), forced.end(), n) == forced.end()) rest.push_back(n);
  }
  std::stable_sort(rest.begin(), rest.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  std::copy(rest.begin(), rest.end(), ranking + forced.size());
}

void RankAllRows(const ProxyAttnOptions& options, const std::vector<double>& scores,
                 BlockSelection& selection) {
  selection.ranking.resize(selection.num_proxies * selection.RankingStride());
  for (int32_t p = 0; p < selection.num_proxies; ++p) {
    for (int64_t m = selection.first_row; m < selection.first_row + selection.num_rows; ++m) {
      const int64_t offset = p * selection.RankingStride() + selection.RankingOffset(m);
      RankRow(m, options, scores.data() + offset, selection.ranking.data() + offset);
    }
  }
}

// Least number of blocks, taken in `order`, whose mass reaches gamma.
template <typename Index>
int64_t LeastPrefix(const double* mass, const Index* order, int64_t n, double gamma) {
  if (gamma >= 1) return n;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += mass[order[i]];
    if (sum >= gamma) return i + 1;
  }
  return n;
}

int64_t OwnBudget(const double* mass, int64_t n, double gamma) {
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return mass[a] > mass[b]; });
  return LeastPrefix(mass, order.data(), n, gamma);
}

// Rules own and shared: one number of blocks for all rows of a head.
std::vector<int64_t> HeadBudgets(const SelectionInput& input, const ProxyAttnOptions& options,
                                 const BlockSelection& selection, std::vector<float>& ratio) {
  const int64_t n = NumBlocks(input.k.rows);
  const std::vector<double> mass = LastRowMass(input);
  std::vector<int64_t> budgets(input.shape.num_heads);
  for (int32_t h = 0; h < input.shape.num_heads; ++h) {
    const int32_t proxy = h / (input.shape.num_heads / options.num_proxies);
    const double* head_mass = mass.data() + h * n;
    const int64_t wanted =
        options.budget == BudgetRule::kOwn
            ? OwnBudget(head_mass, n, options.gamma)
            : LeastPrefix(head_mass, selection.Ranking(proxy, n - 1), n, options.gamma);
    ratio[h] = std::max(ratio[h], static_cast<float>(wanted) / static_cast<float>(n));
    const double budget = std::ceil(double{ratio[h]} * static_cast<double>(n) - 0x1p-10);
    budgets[h] = std::max(static_cast<int64_t>(budget), NumBlocks(options.floor_tokens));
  }
  return budgets;
}

// The least K for which the rows' sum of min(m + 1, K) is `density` of their causal blocks.
int64_t ForcedBudget(const BlockSelection& selection, double density) {
  const int64_t end = selection.first_row + selection.num_rows;
  const auto kept = [&](int64_t k) {
    int64_t sum = 0;
    for (int64_t m = selection.first_row; m < end; ++m) sum += std::min(m + 1, k);
    return static_cast<double>(sum);
  };
  int64_t k = 1;
  while (k < end && kept(k) < density * kept(end)) ++k;
  return k;
}

void SetCountsByRow(const ProxyAttnOptions& options, const ProxyScores& scores,
                    BlockSelection& selection) {
  for (int32_t h = 0; h < selection.num_heads; ++h) {
    const int32_t proxy = h / (selection.num_heads / selection.num_proxies);
    for (int64_t i = 0; i < selection.num_rows; ++i) {
      const int64_t m = selection.first_row + i;
      const int64_t offset = proxy * selection.RankingStride() + selection.RankingOffset(m);
      const int64_t wanted =
          LeastPrefix(&scores.mass[offset], selection.Ranking(proxy, m), m + 1, options.gamma);
      const int64_t budget = std::max(wanted, NumBlocks(options.floor_tokens));
      selection.counts[h * selection.num_rows + i] = static_cast<int32_t>(std::min(m + 1, budget));
    }
  }
}

void SetCountsByHead(const std::vector<int64_t>& budgets, BlockSelection& selection) {
  for (int32_t h = 0; h < selection.num_heads; ++h) {
    for (int64_t i = 0; i < selection.num_rows; ++i) {
      selection.counts[h * selection.num_rows + i] =
          static_cast<int32_t>(std::min(selection.first_row + i + 1, budgets[h]));
    }
  }
}

// Sets the counts of the rows [first, first_row + num_rows) to all causal blocks.
void MakeDense(int64_t first, BlockSelection& selection) {
  for (int32_t h = 0; h < selection.num_heads; ++h) {
    for (int64_t m = std::max(first, selection.first_row);
         m < selection.first_row + selection.num_rows; ++m) {
      selection.counts[h * selection.num_rows + m - selection.first_row] =
          static_cast<int32_t>(m + 1);
    }
  }
}

bool PassesDensity(const BlockSelection& selection, double limit) {
  const double kept = std::accumulate(selection.counts.begin(), selection.counts.end(), 0.0);
  const auto causal = static_cast<double>(selection.num_heads * selection.RankingStride());
  return kept > limit * causal;
}

}  // namespace

HostMatrix SampleAndPool(const HostMatrix& x, int32_t num_heads, int32_t num_groups, int32_t stride,
                         DType dtype) {
  const int64_t head_dim = x.cols / num_heads;
  const int32_t heads_per_group = num_heads / num_groups;
  HostMatrix out((x.rows + stride - 1) / stride, num_groups * head_dim);
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t c = 0; c < out.cols; ++c) {
      const float* first = x.Row(i * stride) + c / head_dim * heads_per_group * head_dim;
      float sum = 0;
      for (int32_t h = 0; h < heads_per_group; ++h) sum += first[h * head_dim + c % head_dim];
      out.Row(i)[c] = RoundTo(sum / static_cast<float>(heads_per_group), dtype);
    }
  }
  return out;
}

ProxyScores ScoreBlocks(const SelectionInput& input, const ProxyAttnOptions& options) {
  const HeadShape& shape = input.shape;
  const int32_t g = options.num_proxies;
  const int32_t key_groups = std::min(g, shape.num_kv_heads);
  const HostMatrix q = SampleAndPool(input.q, shape.num_heads, g, options.stride, input.dtype);
  const HostMatrix k =
      SampleAndPool(input.k, shape.num_kv_heads, key_groups, options.stride, input.dtype);
  const BlockSelection layout = Layout(input, options);
  const int64_t per_block = kBlockTokens / options.stride;
  const int64_t first_sample = input.first_position / options.stride;

  ProxyScores scores;
  scores.log_max.assign(g * layout.RankingStride(), -std::numeric_limits<double>::infinity());
  scores.mass.assign(g * layout.RankingStride(), 0);
  for (int32_t p = 0; p < g; ++p) {
    for (int64_t i = 0; i < q.rows; ++i) {
      const auto log_p = LogSoftmax(q.Row(i) + int64_t{p} * shape.head_dim, k, p / (g / key_groups),
                                    shape.head_dim, first_sample + i + 1);
      const int64_t first_of_row = i / per_block * per_block;
      const auto row_samples = static_cast<double>(std::min(per_block, q.rows - first_of_row));
      const int64_t m = (first_sample + i) / per_block;
      const int64_t offset = p * layout.RankingStride() + layout.RankingOffset(m);
      for (int64_t j = 0; j <= first_sample + i; ++j) {
        double& log_max = scores.log_max[offset + j / per_block];
        log_max = std::max(log_max, log_p[j]);
        scores.mass[offset + j / per_block] += std::exp(log_p[j]) / row_samples;
      }
    }
  }
  return scores;
}

std::vector<double> LastRowMass(const SelectionInput& input) {
  const HeadShape& shape = input.shape;
  const int64_t num_blocks = NumBlocks(input.k.rows);
  const int64_t first_query = (num_blocks - 1) * kBlockTokens - input.first_position;
  const auto num_queries = static_cast<double>(input.q.rows - first_query);
  std::vector<double> mass(shape.num_heads * num_blocks);
  for (int32_t h = 0; h < shape.num_heads; ++h) {
    for (int64_t i = first_query; i < input.q.rows; ++i) {
      const int64_t num_keys = input.first_position + i + 1;
      const auto log_p = LogSoftmax(input.q.Row(i) + int64_t{h} * shape.head_dim, input.k,
                                    h / shape.group_size(), shape.head_dim, num_keys);
      for (int64_t u = 0; u < num_keys; ++u) {
        mass[h * num_blocks + u / kBlockTokens] += std::exp(log_p[u]) / num_queries;
      }
    }
  }
  return mass;
}

BlockSelection SelectBlocks(const SelectionInput& input, const ProxyAttnOptions& options,
                            std::vector<float>& budget_ratio) {
  BlockSelection selection = Layout(input, options);
  const int64_t num_blocks = NumBlocks(input.k.rows);
  if (DenseByRule(input, options)) {
    const std::vector<double> equal(options.num_proxies * selection.RankingStride());
    RankAllRows(options, equal, selection);
    MakeDense(0, selection);
    selection.budget_ratio = budget_ratio;
    return selection;
  }
  const ProxyScores scores = ScoreBlocks(input, options);
  RankAllRows(options, scores.log_max, selection);
  if (options.forced_density > 0) {
    const int64_t budget = ForcedBudget(selection, options.forced_density);
    SetCountsByHead(std::vector<int64_t>(selection.num_heads, budget), selection);
  } else if (options.budget == BudgetRule::kRow) {
    SetCountsByRow(options, scores, selection);
  } else {
    SetCountsByHead(HeadBudgets(input, options, selection, budget_ratio), selection);
  }
  if (input.ends_prompt) MakeDense(num_blocks - options.dense_tail_blocks, selection);
  selection.dense_fallback = PassesDensity(selection, options.dense_above_density);
  if (selection.dense_fallback) MakeDense(0, selection);
  selection.budget_ratio = budget_ratio;
  return selection;
}

}  // namespace headstart::reference
