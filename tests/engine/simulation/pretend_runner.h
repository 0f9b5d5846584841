// Runs steps in simulated time: a layer takes a while, then its KV is published. Pieces fail now
// and then.
#pragma once

#include <cstdint>

#include "engine/run/runner.h"
#include "tests/engine/simulation/model.h"
#include "tests/engine/simulation/mutation.h"
#include "tests/engine/simulation/random.h"
#include "tests/engine/simulation/timeline.h"

namespace headstart::simulation {

class PretendRunner : public Runner {
 public:
  struct Options {
    int32_t num_layers = 1;
    absl::Duration layer_time = absl::Milliseconds(1);  // of a block, and once more for the layer
    int64_t failing_percent = 0;                        // of the pieces
  };
  PretendRunner(const Options& options, Mutation mutation, Random* random, Timeline* timeline,
                Model* model, HostPages* host)
      : options_(options),
        mutation_(mutation),
        random_(*random),
        timeline_(*timeline),
        model_(*model),
        host_(*host) {}

  // Meanwhile other things happen.
  StepResult Run(Step& step) override;

 private:
  absl::Status RunLayers(Piece& piece, RequestBook& request);
  // What the piece fails with, after it has taken its time.
  absl::Status DrawFailure(RequestBook& request);
  void PublishLayer(Piece& piece, int32_t layer, RequestBook& request);

  const Options options_;
  const Mutation mutation_;
  Random& random_;
  Timeline& timeline_;
  Model& model_;
  HostPages& host_;
  std::vector<HostChunk> kept_;  // a planted bug
};

}  // namespace headstart::simulation
