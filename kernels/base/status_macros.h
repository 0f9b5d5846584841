// Two macros for absl::Status; this Abseil has none of its own.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the enclosing function when `expr` is not OK.
#define HEADSTART_RETURN_IF_ERROR(expr)                                   \
  do {                                                                    \
    if (absl::Status headstart_status = (expr); !headstart_status.ok()) { \
      return headstart_status;                                            \
    }                                                                     \
  } while (false)

// Assigns the value of a StatusOr to `lhs` (which may declare a variable), or returns its status.
#define HEADSTART_ASSIGN_OR_RETURN(lhs, expr) \
  HEADSTART_ASSIGN_OR_RETURN_IMPL_(HEADSTART_CONCAT_(headstart_statusor_, __LINE__), lhs, expr)
#define HEADSTART_ASSIGN_OR_RETURN_IMPL_(statusor, lhs, expr) \
  auto statusor = (expr);                                     \
  if (!statusor.ok()) return std::move(statusor).status();    \
  lhs = std::move(statusor).value()
#define HEADSTART_CONCAT_(a, b) HEADSTART_CONCAT_INNER_(a, b)
#define HEADSTART_CONCAT_INNER_(a, b) a##b
