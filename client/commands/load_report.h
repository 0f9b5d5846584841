// What came of a load, for people and for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/commands/load.h"
#include "client/commands/load_summary.h"

namespace headstart {

// One measurement: a preset, and prompts of one length or of many.
struct BenchCell {
  std::string preset;
  std::string tokens;  // the length, "mix" or "trace"
  // InfiniteDuration: no objective was named.
  absl::Duration slo_ttft = absl::InfiniteDuration();
  LoadResult result;
  LoadSummary summary;
};

// A line for each cell: for prompts of one length each. Lines end with '\n'.
std::string FormatCellHeader();
std::string FormatCellLine(const BenchCell& cell);

// The whole of one cell: rates, a line for each class of lengths, errors, prediction.
std::string FormatCellDetails(const BenchCell& cell);

// Seconds; the samples only as TTFT and time to all KV of what went well, in order of start.
nlohmann::json CellJson(const BenchCell& cell);

// One request: times in seconds from the load's start, null for those that did not come.
nlohmann::ordered_json RecordJson(const BenchCell& cell, size_t index);

// Writes records of all prompts of the cells: CSV with a header when the path ends with .csv, else
// a JSON object a line.
absl::Status WriteRecords(const std::string& path, const std::vector<BenchCell>& cells);

}  // namespace headstart
