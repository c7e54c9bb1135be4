//! The names of types, functions and modules: none that has been retired, and none for two types.
//!
//! Ordinary words in prose, variables and fields are no concern of these rules.

use std::collections::{BTreeMap, BTreeSet};

use super::rust_text::{Definition, definitions};
use super::{no_faults, sources};

/// Type names that tell nothing, or that a term of the glossary has replaced.
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
    // Reserved for the reasons why agents are held back, which are to come.
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

/// Retired names that are still in use, by area (see [`area`]). Whoever renames one removes it here.
const NOT_YET_RENAMED: &[(&str, &[&str])] = &[("daemon", &[]), ("tests", &["Known", "hold", "known", "look", "seen"])];

/// Names that several types still share. Whoever renames all but one removes the name here.
const STILL_SHARED: &[&str] = &["Result"];

/// Returns the part of the repository that a file belongs to: the name of its crate, or of the crate
/// that its directory in the daemon is to become.
fn area(path: &str) -> &str {
    let path = path.strip_prefix("crates/").unwrap_or(path);
    let inside = path.strip_prefix("daemon/src/").unwrap_or(path);
    let first = |path: &'_ str| path.split('/').next().map_or(0, str::len);
    let part = &inside[..first(inside)];
    match part.trim_end_matches(".rs") {
        to_be @ ("history" | "shim" | "os" | "failpoint") => to_be,
        _ => &path[..first(path)],
    }
}

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
    let allowed: BTreeSet<(&str, &str)> =
        NOT_YET_RENAMED.iter().flat_map(|(area, names)| names.iter().map(move |name| (*area, *name))).collect();
    let mut used = BTreeSet::new();
    let mut faults = Vec::new();
    for source in sources() {
        for definition in definitions(&source.code).into_iter().filter(is_retired) {
            let Definition { kind, name, line } = &definition;
            match allowed.iter().find(|allowed| **allowed == (area(&source.path), name.as_str())) {
                Some(allowed) => _ = used.insert(*allowed),
                None => faults.push(format!("{}:{line} {kind} {name}", source.path)),
            }
        }
    }
    let renamed = allowed.difference(&used);
    faults
        .extend(renamed.map(|(area, name)| format!("{area} has no '{name}' any more: remove it from NOT_YET_RENAMED")));
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
    for (name, files) in places.iter().filter(|(name, _)| !STILL_SHARED.contains(&name.as_str())) {
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        faults.push(format!("{name}: {}", files.join(", ")));
    }
    let unique = STILL_SHARED.iter().filter(|name| !places.contains_key(**name));
    faults.extend(unique.map(|name| format!("{name} is no longer shared: remove it from STILL_SHARED")));
    no_faults(faults, "two types share a name: qualify one of them");
}
