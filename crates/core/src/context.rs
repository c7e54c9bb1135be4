//! The flash save: score everything with one `now`, tier it, choose what to archive.
//!
//! This is the plan alone; the store applies it in one transaction. Nothing is ever deleted.

use fermata_protocol::UnixMillis;
use fermata_protocol::context::{FlashSaveResult, ItemType, Tier};

use crate::score::{Weights, score, tier};

/// A flash save that is due by tokens archives items until this share of the token limit is left.
pub const DUE_TARGET: f64 = 0.5;

/// The members of an unarchived item that scoring needs.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredItem {
    pub id: i64,
    pub kind: ItemType,
    pub created_at: UnixMillis,
    /// How often it was read.
    pub access_count: u64,
    pub tokens: u64,
    /// Whether it always stays hot.
    pub pinned: bool,
    /// From its last scoring.
    pub tier: Tier,
    /// From its last scoring.
    pub score: f64,
}

/// A score that has changed by less since it was stored is not stored again: age changes every score of ten thousand
/// items every minute, without any effect.
pub const SCORE_GRAIN: f64 = 0.001;

/// When tokens make a flash save due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenLimit {
    pub tokens: u64,
    /// The percentage of the limit from which on a flash save is due.
    pub due_percent: u8,
}

impl TokenLimit {
    /// Says whether so many tokens make a flash save due.
    pub fn is_due(self, tokens: u64) -> bool {
        u128::from(tokens) * 100 >= u128::from(self.tokens) * u128::from(self.due_percent)
    }

    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn target(self) -> u64 {
        (self.tokens as f64 * DUE_TARGET) as u64
    }
}

/// The new score and tier of one item, and whether it is archived.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlannedItem {
    pub id: i64,
    pub score: f64,
    pub tier: Tier,
    /// Whether the flash save archives it.
    pub archive: bool,
    /// Whether the plan differs from what is stored.
    pub changed: bool,
}

/// What a flash save of one agent will do.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FlashSavePlan {
    /// Every unarchived item.
    pub items: Vec<PlannedItem>,
    /// The numbers for the reply.
    pub result: FlashSaveResult,
}

/// Plans the flash save of one agent's unarchived items.
///
/// Cold items are archived. If the flash save is due by tokens, the lowest-scored unpinned items follow, oldest first
/// among equals, until [`DUE_TARGET`] is reached.
pub fn plan_flash_save(items: &[ScoredItem], weights: &Weights, limit: TokenLimit, now: UnixMillis) -> FlashSavePlan {
    let mut planned: Vec<PlannedItem> = items
        .iter()
        .map(|item| {
            let score = score(weights, item.kind, item.created_at, item.access_count, now);
            let tier = tier(score, item.pinned);
            let archive = tier == Tier::Cold;
            let changed = archive || tier != item.tier || (score - item.score).abs() >= SCORE_GRAIN;
            PlannedItem { id: item.id, score, tier, archive, changed }
        })
        .collect();
    let tokens_before: u64 = items.iter().map(|item| item.tokens).sum();
    let mut tokens_after: u64 =
        items.iter().zip(&planned).filter(|(_, plan)| !plan.archive).map(|(item, _)| item.tokens).sum();
    if limit.is_due(tokens_before) {
        let mut order: Vec<usize> = (0..items.len()).filter(|&i| !planned[i].archive && !items[i].pinned).collect();
        order.sort_by(|&a, &b| planned[a].score.total_cmp(&planned[b].score).then(items[a].id.cmp(&items[b].id)));
        for index in order {
            if tokens_after <= limit.target() {
                break;
            }
            (planned[index].archive, planned[index].changed) = (true, true);
            tokens_after -= items[index].tokens;
        }
    }
    let kept = |wanted: Tier| planned.iter().filter(|plan| !plan.archive && plan.tier == wanted).count() as u64;
    let result = FlashSaveResult {
        tokens_before,
        tokens_after,
        items_archived: planned.iter().filter(|plan| plan.archive).count() as u64,
        tokens_archived: tokens_before - tokens_after,
        hot_items_retained: kept(Tier::Hot),
        warm_items_retained: kept(Tier::Warm),
    };
    FlashSavePlan { items: planned, result }
}

/// Adds up the results of several agents' flash saves.
pub fn sum(results: impl IntoIterator<Item = FlashSaveResult>) -> FlashSaveResult {
    results.into_iter().fold(FlashSaveResult::default(), |a, b| FlashSaveResult {
        tokens_before: a.tokens_before + b.tokens_before,
        tokens_after: a.tokens_after + b.tokens_after,
        items_archived: a.items_archived + b.items_archived,
        tokens_archived: a.tokens_archived + b.tokens_archived,
        hot_items_retained: a.hot_items_retained + b.hot_items_retained,
        warm_items_retained: a.warm_items_retained + b.warm_items_retained,
    })
}

/// Returns by how many percent `after` is less than `before`, 0 when there was nothing.
#[allow(clippy::cast_precision_loss)]
pub fn reduction_percentage(before: u64, after: u64) -> f64 {
    if before == 0 { 0.0 } else { (before - after.min(before)) as f64 * 100.0 / before as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY: i64 = 86_400_000;

    fn item(id: i64, kind: ItemType, age_days: i64, tokens: u64) -> ScoredItem {
        ScoredItem {
            id,
            kind,
            created_at: UnixMillis(100 * DAY - age_days * DAY),
            access_count: 0,
            tokens,
            pinned: false,
            tier: Tier::Warm,
            score: 0.5,
        }
    }

    const NOW: UnixMillis = UnixMillis(100 * DAY);
    const LIMIT: TokenLimit = TokenLimit { tokens: 1000, due_percent: 80 };

    #[test]
    fn cold_items_are_archived_and_pinned_ones_stay() {
        let mut pinned = item(3, ItemType::Other, 30, 5);
        pinned.pinned = true;
        let items = [item(1, ItemType::Task, 0, 10), item(2, ItemType::Other, 30, 20), pinned];
        let plan = plan_flash_save(&items, &Weights::default(), LIMIT, NOW);
        assert_eq!(plan.items.iter().map(|p| p.archive).collect::<Vec<_>>(), [false, true, false]);
        assert_eq!((plan.result.tokens_before, plan.result.tokens_after), (35, 15));
        assert_eq!((plan.result.hot_items_retained, plan.result.warm_items_retained), (2, 0));
    }

    #[test]
    fn a_flash_save_due_by_tokens_goes_down_to_half_of_the_limit() {
        let items: Vec<_> = (0..90).map(|i| item(i, ItemType::Code, 0, 10)).collect();
        let plan = plan_flash_save(&items, &Weights::default(), LIMIT, NOW);
        assert_eq!(plan.result.tokens_after, 500);
        assert!(plan.items[..40].iter().all(|p| p.archive), "oldest first among equals");
        assert!(!LIMIT.is_due(plan.result.tokens_after));
        let below: Vec<_> = (0..79).map(|i| item(i, ItemType::Code, 0, 10)).collect();
        assert_eq!(plan_flash_save(&below, &Weights::default(), LIMIT, NOW).result.items_archived, 0);
    }

    #[test]
    fn what_has_not_moved_need_not_be_written() {
        let plan = |items: &[ScoredItem], now| plan_flash_save(items, &Weights::default(), LIMIT, now);
        let mut one = item(1, ItemType::Code, 0, 1);
        let first = plan(&[one.clone()], NOW).items[0];
        assert!(first.changed, "its stored score is another one");
        (one.score, one.tier) = (first.score, first.tier);
        assert!(!plan(&[one.clone()], UnixMillis(NOW.0 + 60_000)).items[0].changed, "a minute is nothing");
        assert!(plan(&[one.clone()], UnixMillis(NOW.0 + DAY / 24)).items[0].changed, "an hour is");
        one.pinned = true;
        assert!(plan(&[one], NOW).items[0].changed, "so is another tier");
    }

    proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn invariant_nothing_is_lost_and_pinned_items_never_leave(
            raw in prop::collection::vec((0i64..40, 0u64..60, any::<bool>(), 0usize..6), 0..60)
        ) {
            let items: Vec<_> = raw.iter().enumerate().map(|(i, (age, tokens, pinned, kind))| ScoredItem {
                pinned: *pinned, ..item(i as i64, ItemType::ALL[*kind], *age, *tokens)
            }).collect();
            let plan = plan_flash_save(&items, &Weights::default(), LIMIT, NOW);
            prop_assert_eq!(plan.items.len(), items.len());
            for (item, planned) in items.iter().zip(&plan.items) {
                prop_assert!(!(item.pinned && planned.archive));
                prop_assert!(planned.tier != Tier::Cold || planned.archive);
            }
            let r = plan.result;
            prop_assert_eq!(r.tokens_before, r.tokens_after + r.tokens_archived);
            prop_assert_eq!(r.items_archived + r.hot_items_retained + r.warm_items_retained, items.len() as u64);
        }
    }
}
