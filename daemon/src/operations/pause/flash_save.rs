//! Plans the flash save of every agent of a project, all for the same `now`.

use fermata_core::context::{FlashSavePlan, TokenLimit, plan_flash_save};
use fermata_protocol::context::FlashSaveResult;
use fermata_protocol::{AgentName, UnixMillis};

use crate::errors::Failure;
use crate::operations::StepContext;
use crate::store::context;

/// The plans, by agent.
pub type Plans = Vec<(AgentName, FlashSavePlan)>;

/// Scores the context items of one agent, or of all, and plans; writes nothing.
///
/// # Errors
/// When the store cannot be read.
pub async fn plan(step: &StepContext, agent: Option<AgentName>, now: UnixMillis) -> Result<Plans, Failure> {
    let name = step.project.name.clone();
    let weights = step.services.weights();
    let config = &step.project.facts.config;
    let limit = TokenLimit { tokens: config.token_limit, due_percent: config.flash_save_at_percent };
    step.services
        .store
        .read(move |connection| {
            let items = context::scored(connection, &name, agent.as_ref())?;
            let plans = items.into_iter().map(|(agent, items)| {
                let plan = plan_flash_save(&items, &weights, limit, now);
                (agent, plan)
            });
            Ok(plans.collect())
        })
        .await
        .map_err(|error| Failure::fault("plan the flash save", &error))
}

/// Returns the sum of the plans' results.
pub fn total(plans: &Plans) -> FlashSaveResult {
    fermata_core::context::sum(plans.iter().map(|(_, plan)| plan.result))
}
