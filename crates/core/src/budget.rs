//! Budgets: what a project has spent, and whether that is as much as it may.
//!
//! A budget that is reached pauses the project. A resume is refused until a person raises or waives the budget:
//! otherwise the next report of usage would pause the project again.

use std::sync::Arc;

use fermata_protocol::budget::Budget;
use fermata_protocol::budget::Usage;
use fermata_protocol::pause::PauseCause;
use fermata_protocol::{AgentName, Code, Refusal};

use crate::project::{Project, ProjectState, Resting};

/// A budget that is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReachedBudget {
    /// Whose budget it is; that of the project when none.
    pub agent: Option<AgentName>,
    /// Which bound is reached.
    pub cause: PauseCause,
    /// A sentence for people.
    pub reason: String,
}

/// Returns what the agents of a project have spent, removed agents included.
pub fn spent(project: &Project) -> Usage {
    project.agents.values().fold(project.counters.removed_usage, |sum, agent| sum.plus(&agent.usage))
}

/// Finds a budget that is reached: that of the project, then those of its agents. The budget of an agent that has
/// ended is not considered, since the agent spends nothing more; its usage still counts for the project.
pub fn reached(project: &Project) -> Option<ReachedBudget> {
    let whole = || {
        let budget = &project.facts.config.budget;
        // Do not sum a thousand agents for a budget that is not set.
        if budget.is_unset() {
            return None;
        }
        let spent = spent(project);
        let cause = budget.reached(&spent)?;
        let reason = sentence(&format!("project '{}'", project.name), budget, &spent, cause);
        Some(ReachedBudget { agent: None, cause, reason })
    };
    let one = || {
        project.agents.values().filter(|agent| !agent.is_terminal()).find_map(|agent| {
            let budget = &agent.spec.supervision.budget;
            let cause = budget.reached(&agent.usage)?;
            let reason = sentence(&format!("agent '{}'", agent.name), budget, &agent.usage, cause);
            Some(ReachedBudget { agent: Some(agent.name.clone()), cause, reason })
        })
    };
    whole().or_else(one)
}

/// Says whether the change from `before` to `after` calls for a pause.
pub fn calls_for_pause(before: &Project, after: &Project) -> bool {
    match &*after.state {
        ProjectState::Resting(Resting::Active) => reached(after).is_some(),
        // The operation may end in an active project: a pause that is undone, a resume. Called for once, since each
        // request for a pause waits for the end of the operation.
        ProjectState::Pausing(_) | ProjectState::Resuming(_) | ProjectState::Restoring(_) => {
            reached(after).is_some() && reached(before).is_none()
        }
        ProjectState::Resting(_) | ProjectState::Paused(_) | ProjectState::Broken(_) => false,
    }
}

fn sentence(subject: &str, budget: &Budget, spent: &Usage, cause: PauseCause) -> String {
    let dollars = |micro: u64| format!("${}.{:02}", micro / 1_000_000, micro % 1_000_000 / 10_000);
    match cause {
        PauseCause::CostBudget => {
            let bound = budget.cost_micro_usd.unwrap_or_default();
            format!("{subject} has spent {} of its budget of {}", dollars(spent.cost_micro_usd), dollars(bound))
        }
        PauseCause::TokenBudget
        | PauseCause::Person
        | PauseCause::Agent
        | PauseCause::Signal
        | PauseCause::Shutdown
        | PauseCause::MemoryPressure
        | PauseCause::DiskSpace => {
            let bound = budget.tokens.unwrap_or_default();
            format!("{subject} has used {} tokens of its budget of {bound}", spent.tokens())
        }
    }
}

/// Refuses the resume of a project whose budget is reached.
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

/// Waives every budget that is reached.
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
