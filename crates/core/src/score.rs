//! The score of a context item and the tier that follows from it.
//!
//! `score = clamp(0.4*type + 0.4*exp(-0.5*age_days) + 0.2*min(ln(access_count+1)/10, 1), 0, 1)`

use std::collections::BTreeMap;

use fermata_protocol::UnixMillis;
use fermata_protocol::context::{ItemType, Tier};

/// The share of the type in the score.
pub const TYPE_SHARE: f64 = 0.4;
/// The share of the age in the score.
pub const AGE_SHARE: f64 = 0.4;
/// The share of the accesses in the score.
pub const ACCESS_SHARE: f64 = 0.2;
/// How fast an item ages, per day.
pub const DECAY_PER_DAY: f64 = 0.5;
/// From this score on an item is hot.
pub const HOT: f64 = 0.8;
/// From this score on an item is warm.
pub const WARM: f64 = 0.4;
/// Scores this little below a bound still count as reaching it: a new TASK, whose score is
/// exactly 0.8 and falls from then on, is hot for its first hour.
pub const EPSILON: f64 = 0.01;

const MS_PER_DAY: f64 = 86_400_000.0;

/// The weights of the types, 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    by_type: [f64; ItemType::ALL.len()],
}

impl Default for Weights {
    fn default() -> Self {
        Self { by_type: ItemType::ALL.map(default_weight) }
    }
}

impl Weights {
    /// Replaces the weights of some types; values are clamped to 0..=1.
    #[must_use]
    pub fn with(mut self, changed: &BTreeMap<ItemTypeKey, f64>) -> Self {
        for (key, weight) in changed {
            if let Some(index) = ItemType::ALL.iter().position(|t| *t == key.0) {
                self.by_type[index] = weight.clamp(0.0, 1.0);
            }
        }
        self
    }

    /// Returns the weight of a type.
    pub fn of(&self, kind: ItemType) -> f64 {
        ItemType::ALL.iter().position(|t| *t == kind).map_or(0.5, |index| self.by_type[index])
    }
}

/// An item type as a sorted key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ItemTypeKey(pub ItemType);

impl PartialOrd for ItemTypeKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ItemTypeKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.as_str().cmp(other.0.as_str())
    }
}

fn default_weight(kind: ItemType) -> f64 {
    match kind {
        ItemType::Task => 1.0,
        ItemType::Code => 0.8,
        ItemType::Error => 0.7,
        ItemType::TestResult => 0.6,
        ItemType::PrdSection | ItemType::Other => 0.5,
    }
}

/// Computes the score of an item, 0 to 1. An item from the future counts as new.
pub fn score(weights: &Weights, kind: ItemType, created_at: UnixMillis, access_count: u64, now: UnixMillis) -> f64 {
    #[allow(clippy::cast_precision_loss)] // Ages and counts stay far below 2^52.
    let (age_days, accesses) = (now.since(created_at) as f64 / MS_PER_DAY, access_count as f64);
    let type_part = TYPE_SHARE * weights.of(kind);
    let age_part = AGE_SHARE * (-DECAY_PER_DAY * age_days).exp();
    let access_part = ACCESS_SHARE * ((accesses + 1.0).ln() / 10.0).min(1.0);
    (type_part + age_part + access_part).clamp(0.0, 1.0)
}

/// Returns the tier of a score; pinned items are hot.
pub fn tier(score: f64, pinned: bool) -> Tier {
    if pinned || score >= HOT - EPSILON {
        Tier::Hot
    } else if score >= WARM - EPSILON {
        Tier::Warm
    } else {
        Tier::Cold
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: i64 = 3_600_000;

    fn at(kind: ItemType, age_ms: i64, accesses: u64) -> f64 {
        score(&Weights::default(), kind, UnixMillis(0), accesses, UnixMillis(age_ms))
    }

    #[test]
    fn the_formula_gives_the_documented_numbers() {
        assert!((at(ItemType::Task, 0, 0) - 0.8).abs() < 1e-12);
        assert!((at(ItemType::Code, 0, 0) - 0.72).abs() < 1e-12);
        assert!((at(ItemType::Other, 24 * HOUR, 0) - (0.2 + 0.4 * (-0.5_f64).exp())).abs() < 1e-12);
        assert!((at(ItemType::Task, 0, 9) - (0.8 + 0.02 * 10_f64.ln())).abs() < 1e-12);
    }

    #[test]
    fn a_new_task_is_hot_for_its_first_hour() {
        assert_eq!(tier(at(ItemType::Task, 0, 0), false), Tier::Hot);
        assert_eq!(tier(at(ItemType::Task, HOUR, 0), false), Tier::Hot);
        assert_eq!(tier(at(ItemType::Task, 2 * HOUR, 0), false), Tier::Warm);
        assert_eq!(tier(0.0, true), Tier::Hot);
    }

    proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn invariant_scores_stay_in_range_and_fall_with_age(
            kind in prop::sample::select(ItemType::ALL.to_vec()),
            age in 0i64..4_000_000_000_000,
            older in 0i64..1_000_000_000,
            accesses in any::<u64>(),
        ) {
            let (young, old) = (at(kind, age, accesses), at(kind, age + older, accesses));
            prop_assert!((0.0..=1.0).contains(&young));
            prop_assert!(old <= young);
        }
    }
}
