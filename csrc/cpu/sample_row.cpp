// One row's token: statistics, then draws above a rising pivot until one is among the tokens that the filters keep.
//
// What the filters keep is an upper set: with a token it holds every token with a larger logit. So a drawn token that
// is outside proves that everything up to its logit is outside, and the next draw looks above it only. The noise stays
// the same, so the first token inside has the best score of all inside, whatever came before. A tail token is drawn
// before all tokens above it with probability p / (p + mass above it); summed over the tail that is about ln(1 / mass
// kept) more draws: 0.1 for top_p = 0.9, 5 if top_k keeps 1 % of the mass; at most one per distinct logit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "row_kernels.h"
#include "scalar_types.h"

namespace aepo {
namespace {

constexpr double kMinNoise = -3.131;  // of the largest word: -ln(33 ln 2), rounded down

struct Row {
  const RowKernels& kernels;
  LogitsType type;
  const char* x;
  int64_t vocab, element_bytes;

  // body(its logits, their number, its first token) for every segment
  template <class Body>
  void for_each_segment(const Body& body) const {
    for (int64_t i = 0; i < vocab; i += kSegment) body(x + i * element_bytes, std::min(kSegment, vocab - i), i);
  }
};

bool kept(const Row& row, const Draw& drawn, const RowStats& stats, const SampleRow& params, double temperature) {
  if (drawn.logit == stats.max) return true;  // nothing lies above it
  if (std::exp((drawn.logit - stats.max) / temperature) < params.min_p) return false;
  if (params.top_k >= row.vocab && params.top_p >= 1) return true;
  Above above = {0, 0};
  row.for_each_segment([&](const char* x, int64_t n, int64_t) {
    row.kernels.above[row.type](x, n, drawn.logit, stats.max, log2_scale(temperature), above);
  });
  const double share = above.mass / std::exp(stats.log_sum);
  return above.count < params.top_k && (share < params.top_p || params.top_p >= 1);
}

}  // namespace

SampledToken sample_row(LogitsType type, const void* x, int64_t vocab, int64_t element_bytes, const SampleRow& params) {
  const Row row = {row_kernels(), type, static_cast<const char*>(x), vocab, element_bytes};
  const bool greedy = params.temperature == 0;
  const double temperature = greedy ? 1 : params.temperature;
  std::vector<SegmentStats> partial;
  row.for_each_segment([&](const char* logits, int64_t n, int64_t) {
    partial.push_back(row.kernels.token_stats[type](logits, n, log2_scale(temperature)));
  });
  const RowStats stats = merge_segments(partial.data(), partial.size(), temperature);
  if (std::isnan(stats.log_sum)) return {-1, stats.log_sum, stats.entropy};

  DrawRow draw = {stats.max, minus_infinity<double>(), temperature, greedy, params.seed, params.offset};
  if (params.min_p > 0) {
    // What min_p cuts off needs no draw to be found. The thousandth leaves its very bound to the exact test.
    const double bound = stats.max + temperature * (std::log(params.min_p) - 1e-3);
    draw.pivot = std::min(bound, std::nextafter(stats.max, minus_infinity<double>()));
  }
  for (;;) {
    // The row's maximum itself scores at least that much.
    Draw best = {greedy ? -1e-9 : kMinNoise, -1, 0};
    row.for_each_segment([&](const char* logits, int64_t n, int64_t first) {
      row.kernels.draw[type](logits, n, first, draw, best);
    });
    if (kept(row, best, stats, params, temperature)) {
      return {best.token, label_logprob(best.logit, stats, temperature), stats.entropy};
    }
    draw.pivot = best.logit;
  }
}

}  // namespace aepo
