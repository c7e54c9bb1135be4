//! Plans a restore, applies the plan, and verifies the result.

pub(crate) mod apply;
pub(crate) mod attributes;
pub(crate) mod full_verification;
pub(crate) mod hard_links;
pub(crate) mod plan;
pub(crate) mod planner;
pub(crate) mod recheck;
pub(crate) mod report;
pub(crate) mod repository_heads;
pub(crate) mod staging;
