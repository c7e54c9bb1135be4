//! Budgets: what a project has spent, and whether that is as much as it may.
//!
//! A budget that is reached pauses the project. A resume is refused until the budget is raised, or
//! waived by a person: otherwise the next report of usage would pause it again.

use std::sync::Arc;

use fermata_protocol::budget::Budget;
use fermata_protocol::budget::Usage;
use fermata_protocol::pause::PauseCause;
use fermata_protocol::{AgentName, Code, Refusal};

use crate::project::{Project, ProjectState, Resting};

/// A budget that is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// Whose budget; the project's own when none.
    pub agent: Option<AgentName>,
    /// Which bound.
    pub cause: PauseCause,
    /// A sentence for people.
    pub reason: String,
}

/// Returns what the agents of a project have spent, those included that were removed since.
pub fn spent(project: &Project) -> Usage {
    project.agents.values().fold(project.counters.removed_usage, |sum, agent| sum.plus(&agent.usage))
}

/// Finds a budget that is reached: the project's, then its agents'. An agent that has ended spends
/// nothing more, so that its own bounds nothing; what it has spent counts for the project.
pub fn reached(project: &Project) -> Option<Reached> {
    let whole = || {
        let budget = &project.facts.config.budget;
        // Summing a thousand agents for a budget that is not there would be waste.
        if budget.is_unset() {
            return None;
        }
        let spent = spent(project);
        let cause = budget.reached(&spent)?;
        let reason = sentence(&format!("project '{}'", project.name), budget, &spent, cause);
        Some(Reached { agent: None, cause, reason })
    };
    let one = || {
        project.agents.values().filter(|agent| !agent.is_terminal()).find_map(|agent| {
            let budget = &agent.spec.supervision.budget;
            let cause = budget.reached(&agent.usage)?;
            let reason = sentence(&format!("agent '{}'", agent.name), budget, &agent.usage, cause);
            Some(Reached { agent: Some(agent.name.clone()), cause, reason })
        })
    };
    whole().or_else(one)
}

/// Says whether a pause is to be asked for, now that a project has become what it is `after`.
pub fn asks_for_pause(before: &Project, after: &Project) -> bool {
    match &*after.state {
        ProjectState::Resting(Resting::Active) => reached(after).is_some(),
        // What is under way may come back to an active project: a pause that is undone, a resume. Asked
        // once, since each that asks waits for its end.
        ProjectState::Pausing(_) | ProjectState::Resuming(_) | ProjectState::Restoring(_) => {
            reached(after).is_some() && reached(before).is_none()
        }
        ProjectState::Resting(_) | ProjectState::Paused(_) | ProjectState::Broken(_) => false,
    }
}

fn sentence(who: &str, budget: &Budget, spent: &Usage, cause: PauseCause) -> String {
    let dollars = |micro: u64| format!("${}.{:02}", micro / 1_000_000, micro % 1_000_000 / 10_000);
    match cause {
        PauseCause::CostBudget => {
            let bound = budget.cost_micro_usd.unwrap_or_default();
            format!("{who} has spent {} of its budget of {}", dollars(spent.cost_micro_usd), dollars(bound))
        }
        _ => {
            let bound = budget.tokens.unwrap_or_default();
            format!("{who} has used {} tokens of its budget of {bound}", spent.tokens())
        }
    }
}

/// Refuses to let a project go on whose budget is reached.
///
/// # Errors
/// `budget_exceeded`.
pub fn refuse_over_budget(project: &Project) -> Result<(), Refusal> {
    let Some(reached) = reached(project) else { return Ok(()) };
    let raise = match (&reached.agent, reached.cause) {
        (None, PauseCause::CostBudget) => format!("fermatactl project set {} --cost-budget DOLLARS, or ", project.name),
        (None, _) => format!("fermatactl project set {} --token-budget N, or ", project.name),
        (Some(_), _) => String::new(),
    };
    Err(Refusal::new(Code::BudgetExceeded, reached.reason)
        .hint(format!("{raise}fermatactl resume {} --over-budget", project.name)))
}

/// Lets every budget that is reached bound nothing any more.
pub fn waive_reached(project: &mut Project) {
    if project.facts.config.budget.reached(&spent(project)).is_some() {
        Arc::make_mut(&mut project.facts).config.budget.waived = true;
    }
    for agent in project.agents.values_mut() {
        if agent.spec.supervision.budget.reached(&agent.usage).is_some() {
            Arc::make_mut(agent).spec.supervision.budget.waived = true;
        }
    }
}
