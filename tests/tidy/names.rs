//! The names of types, functions and modules: no retired name is used, and no two types share a name.
//!
//! The rules do not apply to prose, variables and fields.

use std::collections::{BTreeMap, BTreeSet};

use super::rust_text::{Definition, definitions};
use super::{no_faults, sources};

/// Type names that tell nothing, or that the glossary replaces.
const RETIRED_TYPES: &[&str] = &[
    "Aside",
    "Course",
    "CoveredThen",
    "Distrusted",
    "Draft",
    "Drafted",
    "Drafting",
    "Due",
    "FileWish",
    "Found",
    "Held",
    // Reserved for the planned reasons for which agents are held back.
    "Hold",
    "Kept",
    "Known",
    "Look",
    "Looked",
    "Looking",
    "Looks",
    "News",
    "Observed",
    "Outcome",
    "Picture",
    "Primed",
    "Reach",
    "Rung",
    "Salvage",
    "Seen",
    "Since",
    "Site",
    "Standing",
    "Standings",
    "Taken",
    "Tally",
    "There",
    "Told",
    "Upkeep",
    "Verdict",
    "What",
    "Whole",
];

const RETIRED_MODULES: &[&str] = &[
    "aside",
    "beneath",
    "course",
    "covered_then",
    "distrust",
    "draft",
    "drafting",
    "due",
    "found",
    "heads",
    "hold",
    "keep",
    "keeper",
    "look",
    "observe",
    "picture",
    "prime",
    "reach",
    "rung",
    "salvage",
    "since",
    "sketch",
    "standing",
    "stranger",
    "stuck",
    "tally",
    "upkeep",
    "verdict",
    "whole",
];

const RETIRED_FUNCTIONS: &[&str] = &[
    "course",
    "distrust",
    "distrusted",
    "draft",
    "due",
    "held",
    "hold",
    "known",
    "look",
    "look_again",
    "look_around",
    "look_closely",
    "look_if_due",
    "look_in_turn",
    "look_under_way",
    "looked",
    "looking",
    "looks",
    "observe",
    "prime",
    "reach",
    "rung",
    "salvage",
    "seen",
    "site",
    "sketch",
    "standing",
    "suspect",
    "suspects",
    "told",
    "verdict",
    "whole",
    "wish",
];

/// Names that several types share for a reason: an alias of `Result` for a crate's own error is conventional.
const SHARED: &[&str] = &["Result"];

fn is_retired(definition: &Definition) -> bool {
    let retired = match definition.kind {
        "fn" => RETIRED_FUNCTIONS,
        "mod" => RETIRED_MODULES,
        _ => RETIRED_TYPES,
    };
    retired.contains(&definition.name.as_str())
}

#[test]
fn retired_names_stay_retired() {
    let mut faults = Vec::new();
    for source in sources() {
        for Definition { kind, name, line } in definitions(&source.code).into_iter().filter(is_retired) {
            faults.push(format!("{}:{line} {kind} {name}", source.path));
        }
    }
    no_faults(faults, "a retired name: CONTRIBUTING.md has the terms to use");
}

#[test]
fn no_two_types_share_a_name() {
    let mut places: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources().iter().filter(|source| !source.is_test()) {
        for definition in definitions(source.shipped()).into_iter().filter(Definition::is_type) {
            places.entry(definition.name).or_default().insert(source.path.clone());
        }
    }
    places.retain(|_, files| files.len() > 1);
    let mut faults = Vec::new();
    for (name, files) in places.iter().filter(|(name, _)| !SHARED.contains(&name.as_str())) {
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        faults.push(format!("{name}: {}", files.join(", ")));
    }
    let unique = SHARED.iter().filter(|name| !places.contains_key(**name));
    faults.extend(unique.map(|name| format!("{name} is not shared any more: remove it from SHARED")));
    no_faults(faults, "two types share a name: qualify one of them");
}
