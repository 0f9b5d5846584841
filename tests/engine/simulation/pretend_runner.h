// Runs steps in simulated time: a layer takes a while, then its KV is published. Pieces fail now
// and then.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/run/runner.h"
#include "tests/engine/simulation/device.h"
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
    int64_t failing_permille = 0;                       // of the pieces
  };
  PretendRunner(const Options& options, Mutation mutation, Random* random, Timeline* timeline,
                Model* model, HostPages* host, Device* device)
      : options_(options),
        mutation_(mutation),
        random_(*random),
        timeline_(*timeline),
        model_(*model),
        host_(*host),
        device_(*device) {}

  // Meanwhile other things happen.
  StepResult Run(Step& step, UrgentWork* urgent) override;
  int64_t layers_done() const override { return 0; }

 private:
  // A piece on its way through the layers.
  struct Way {
    Piece* piece = nullptr;
    RequestBook* request = nullptr;
    int64_t failing_layer = -1;
    absl::Status status;
  };
  std::vector<Way> Begin(Step& step);
  void RunLayer(std::vector<Way>& ways, int32_t layer);
  // Returns the time that it took.
  absl::Duration RunUrgent(UrgentWork* urgent);
  // What a piece fails with, after it has taken its time. A lost device takes all with it.
  void Fail(std::vector<Way>& ways, Way& failing);
  PieceResult End(Way& way, absl::Duration took);
  void PublishLayer(Piece& piece, int32_t layer, RequestBook& request);

  const Options options_;
  const Mutation mutation_;
  Random& random_;
  Timeline& timeline_;
  Model& model_;
  HostPages& host_;
  Device& device_;
  std::vector<HostChunk> kept_;  // planted bugs
  std::shared_ptr<const SlotState> last_state_;
};

}  // namespace headstart::simulation
