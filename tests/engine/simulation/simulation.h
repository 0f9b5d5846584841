// A whole life of a scheduler from one number: who comes when with what, who reads how, what goes
// wrong. The same number gives the same life.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/engine/simulation/model.h"
#include "tests/engine/simulation/mutation.h"

namespace headstart::simulation {

struct Report {
  std::optional<Violation> violation;
  Sightings seen;
  std::vector<std::string> trace;
};

Report Simulate(uint64_t seed, Mutation mutation = Mutation::kNone, bool trace = false);

}  // namespace headstart::simulation
