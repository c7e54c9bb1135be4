//! Plans the flash save of every agent of a project, with one `now`.

use fermata_core::context::{FlashSavePlan, TokenLimit, plan_flash_save};
use fermata_protocol::context::FlashSaveResult;
use fermata_protocol::{AgentName, UnixMillis};

use crate::errors::Failure;
use crate::operations::StepContext;
use crate::store::context;

/// The plans, by agent.
pub type Plans = Vec<(AgentName, FlashSavePlan)>;

/// Reads what scoring needs and plans; nothing is written.
///
/// # Errors
/// When the store cannot be read.
pub async fn plan(site: &StepContext, agent: Option<AgentName>, now: UnixMillis) -> Result<Plans, Failure> {
    let name = site.project.name.clone();
    let weights = site.services.weights();
    let config = &site.project.facts.config;
    let limit = TokenLimit { tokens: config.token_limit, due_percent: config.flash_save_at_percent };
    site.services
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

/// Adds the plans' numbers up.
pub fn total(plans: &Plans) -> FlashSaveResult {
    fermata_core::context::sum(plans.iter().map(|(_, plan)| plan.result))
}
