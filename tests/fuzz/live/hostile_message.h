// Messages made from their descriptors, with the values on which parsers and checks break.
#pragma once

#include <google/protobuf/message.h>

#include <string>

#include "tests/engine/simulation/random.h"

namespace headstart::testing {

using simulation::Random;

// Gives each field, with this probability, a value of the edge of its type, or one beyond.
void SpoilFields(Random& random, int64_t percent, google::protobuf::Message* message);

// A serialised message, now and then cut, changed in a byte, with a part of it twice, with fields
// that nobody knows, or with an encoding that is none.
std::string SpoilBytes(Random& random, int64_t percent, std::string bytes);

// One of them.
template <typename T, size_t n>
const T& OneOf(Random& random, const T (&choices)[n]) {
  return choices[random.Between(0, n - 1)];
}

}  // namespace headstart::testing
